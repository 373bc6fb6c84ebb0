"""Images that other libraries, models and networks make."""
