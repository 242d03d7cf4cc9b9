"""The batch system around :mod:`nafnet`: listing, restoring on Ray Data, scoring, reporting, scheduling."""
