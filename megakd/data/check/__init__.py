"""`megakd data check`: what is in shards, what training would drop of it and why, as a table, JSON and a page."""
