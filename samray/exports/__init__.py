"""An output in another tool's format. One file per format; `formats` is the table of them."""
