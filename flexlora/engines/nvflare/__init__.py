"""NVFlare as the transport: what its clients are sent and return, and the files of the server's adapter."""
