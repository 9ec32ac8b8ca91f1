"""What a run shows: its records, the tables and figures made of them, and the page. Reads run folders only."""
