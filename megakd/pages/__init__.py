"""What the pages of reports are made of: template and stylesheet, figures, tables, Markdown; and in `run/` the page of one run."""
