"""What an INPUT holds: listing it, fetching the bytes of its images, decoding them to RGB."""
