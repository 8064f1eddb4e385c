"""What every measurement needs: timing, a probe of the CPU's load, provenance, and how results are written."""
