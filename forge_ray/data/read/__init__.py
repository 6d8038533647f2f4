"""Files of rows → raw rows: which bytes, cut where, read how."""
