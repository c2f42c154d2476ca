"""The page of one run: `megakd report RUN`."""
