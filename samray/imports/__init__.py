"""Import annotations of other tools (SA-1B JSON, COCO instances) as an output of samray."""
