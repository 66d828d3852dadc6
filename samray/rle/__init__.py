"""COCO run lengths: encode masks, decode untrusted ones, and trace their outlines as polygons."""
