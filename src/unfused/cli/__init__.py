"""The `unfused` command. Each module here other than `main` has a `register(app)` that adds its commands."""
