"""What the tests of alive run as processes of their own, and what stands before the database."""
