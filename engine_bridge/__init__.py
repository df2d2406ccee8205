"""Everything that touches a live engine, and the bundles in which policies get there."""
