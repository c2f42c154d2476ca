"""Studies by name, one `.toml` each: `megakd study NAME`."""
