"""Other tools' annotations as an output of samray: SA-1B's JSON files, and COCO's instances."""
