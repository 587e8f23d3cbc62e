"""Readers of public file formats, one file for each kind of source."""
