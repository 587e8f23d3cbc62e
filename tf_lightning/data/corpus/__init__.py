"""The prepared corpus on disk: format, writer, and how it is prepared."""
