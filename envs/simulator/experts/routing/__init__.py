"""Which experts the tokens of a workload choose: recorded, generated, or drawn from power laws."""
