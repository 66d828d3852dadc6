"""An output in other tools' formats, piece by piece: `job` runs it, `formats` is the table of them."""
