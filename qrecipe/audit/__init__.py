"""What both audits share: SQNR, samples, ranges, float kernels, the code around roots."""
