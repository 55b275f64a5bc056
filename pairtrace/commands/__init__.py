"""The commands: each parses its options, builds one configuration, calls one engine function, returns an answer."""
