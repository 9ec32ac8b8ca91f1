"""What happens to an update between client and server."""
