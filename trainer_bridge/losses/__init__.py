"""The objective of a policy update, and what is measured of it."""
