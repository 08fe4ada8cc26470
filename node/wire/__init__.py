"""Records, frames and requests as bytes, and back. Only this folder parses what others sent."""
