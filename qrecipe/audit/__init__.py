"""The yardsticks: SQNR, samples, ranges, averages, float kernels, what lies around roots."""
