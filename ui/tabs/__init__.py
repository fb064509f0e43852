"""The tabs of the page: one file per job."""
