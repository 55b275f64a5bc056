"""The activation store: layout, writer, reader, verification."""
