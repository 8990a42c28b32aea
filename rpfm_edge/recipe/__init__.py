"""A whole run from one TOML file."""
