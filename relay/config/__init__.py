"""config.toml: its shape (`model`), its secrets, and how it is read."""
