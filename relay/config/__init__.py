"""config.toml: its shape (`schema`), its secrets, and how it is read."""
