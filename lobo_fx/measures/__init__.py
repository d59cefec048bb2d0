"""What programs and files weigh, cost and give: counts, fidelity, latency, memory, kernel costs."""
