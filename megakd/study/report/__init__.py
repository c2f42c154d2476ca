"""A study's page, tables and figures."""
