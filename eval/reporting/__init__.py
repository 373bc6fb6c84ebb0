"""Tables, captions, flags, pictures and pages."""
