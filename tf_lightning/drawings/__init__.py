"""Drawings as sources of documents: emoji from a color font, and SVG files."""
