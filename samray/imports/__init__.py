"""Annotations of other tools (SA-1B's JSON, COCO's instances) as an output of samray."""
