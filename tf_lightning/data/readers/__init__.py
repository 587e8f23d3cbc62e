"""Sources for public file formats, one module for each kind of content."""
