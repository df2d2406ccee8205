"""What the MoE layers of a step cost when the experts differ: the heaviest rank of each layer decides.

The time of a layer on a rank is ``compute(load) + expert_s * activated``: ``load`` counts the tokens that the rank's
experts receive, ``activated`` the experts that receive any, whose weights must be read. The layer takes as long as the
slowest rank; dispatch and combine take as long as the rank with the most traffic.

``step`` goes through what a step of a group needs; ``mean_field`` and ``sampled`` are the two ways to its loads.
"""
