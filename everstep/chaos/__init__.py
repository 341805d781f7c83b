"""`everstep chaos`: kills of your own running server, and a certificate."""
