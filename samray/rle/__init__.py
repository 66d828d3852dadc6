"""COCO's run lengths: encoding masks, decoding what somebody else may have written, outlines as polygons."""
