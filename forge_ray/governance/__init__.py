"""Views over what the stages wrote: trace, impact, lineage, difference, reproduction, verification."""
