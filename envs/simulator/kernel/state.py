"""Memory of a simulated cluster: one record of the cluster, and tables with a record per request and per engine.

Fields named ``*_at`` are addresses of arrays that ``build.Memory`` owns. Shapes: N engines, R requests, S
``max_num_seqs``, B ``num_blocks``, H slots of the hash table.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

State: TypeAlias = Any  # a CLUSTER record, as compiled functions take it
Engine: TypeAlias = Any  # an ENGINE record
Experts: TypeAlias = Any  # an EXPERTS record

# Status of a request; one that leaves has its last token in the running step, which was scheduled ahead.
PENDING, WAITING, PREFILL, DECODE, FINISHED, LEAVING = range(6)

# Order of a waiting queue.
ORDER_FCFS, ORDER_PRIORITY, ORDER_STATIC, ORDER_DYNAMIC, ORDER_EXTERNAL, ORDER_PICK = range(6)

# What an engine is doing: nothing, about to schedule, a common step, a step scheduled request by request.
IDLE, READY, STEP_STEADY, STEP_MIXED = range(4)

# Scheduling ahead: no step runs; one runs and the next is scheduled; one has begun and the next is to be scheduled.
GROUNDED, IN_FLIGHT, TAKEN_OFF = range(3)

NONE = -1

# Expert model: buckets of the load window that an expert policy sees; tables are by batch sizes 1, 2, 4, ...
WINDOW_BUCKETS = 8
BATCH_SIZES = 15

REQUEST = np.dtype(
    [
        # Given by the workload.
        ("arrival_s", "f8"),
        ("think_s", "f8"),
        ("deadline_s", "f8"),
        ("predicted_tokens", "f8"),
        ("stream", "i8"),
        ("prompt", "i4"),
        ("output", "i4"),
        ("user", "i4"),
        ("session", "i4"),
        ("turn", "i4"),
        ("priority", "i4"),
        ("child", "i4"),  # follow-up turn
        ("template", "i4"),
        ("template_tokens", "i4"),
        ("rank", "i4"),  # breaks ties of a priority queue, as vLLM's request id does
        ("shared_stream", "i4"),  # another request has the same stream
        ("task", "i4"),  # expert model: what its tokens are about
        ("bank_start", "i8"),  # expert model, sampled: the sequence of the bank whose routing it follows,
        ("bank_length", "i4"),  # its length,
        ("bank_offset", "i4"),  # and where it begins
        # Outcome.
        ("first_s", "f8"),
        ("finish_s", "f8"),
        ("engine", "i4"),
        ("preemptions", "i4"),
        ("hit_tokens", "i4"),  # prompt tokens found in the prefix cache at first admission
        ("uncached", "i4"),  # prompt tokens that the router believed not cached where it sent the request
        ("served", "i4"),  # generated tokens charged to the user, NONE before the prompt is
        ("retries", "i4"),  # dispatches beyond the first, after the death of an engine
        # Progress.
        ("key", "f8"),
        ("tick0", "i8"),  # while decoding: generated tokens = engine tick - tick0
        ("generated", "i4"),  # while not decoding
        ("computed", "i4"),  # while not decoding: tokens whose KV is computed
        ("row", "i4"),  # row of the block table, with prefix caching
        ("findable", "i4"),  # while running: leading blocks that belong into the prefix cache
        ("link", "i4"),  # next in a queue, or next sibling in a heap
        ("heap_child", "i4"),
        ("status", "i4"),
        # Scheduling ahead only.
        ("cached", "i4"),  # leading blocks that the prefix cache has been told of
        ("skipped", "i8"),  # engine tick after a step that left it out: no token of it is in flight then
    ],
    align=True,
)

ENGINE = np.dtype(
    [
        # What every arrival reads, side by side.
        ("activity", "i8"),
        ("running", "i8"),
        ("waiting", "i8"),
        ("free_blocks", "i8"),
        ("num_blocks", "i8"),
        ("prefix_caching", "i8"),
        # Availability.
        ("accepting", "i8"),
        ("alive", "i8"),
        ("hung", "i8"),
        ("hung_s", "f8"),  # what was left of the running step when the engine hung
        ("reporting", "i8"),
        ("changed", "i8"),  # it stands on the list of changed engines
        ("index", "i8"),
        # The router's exact counters.
        ("inflight", "i8"),
        ("inflight_prompt", "i8"),
        ("prefill_requests", "i8"),
        ("prefill_tokens", "i8"),
        ("uncached_tokens", "i8"),
        ("fresh_tokens", "i8"),
        ("first_token_s", "f8"),
        ("dispatched", "i8"),
        ("inflight_output", "i8"),  # true output tokens of the requests in flight
        ("waiting_tokens", "i8"),  # tokens that waiting requests must have computed
        ("waiting_generated", "i8"),  # tokens that waiting requests have generated before
        ("ttft_ewma_s", "f8"),
        ("itl_ewma_s", "f8"),
        # Limits, as in vLLM.
        ("block_size", "i8"),
        ("max_num_seqs", "i8"),
        ("max_num_batched_tokens", "i8"),
        ("long_prefill_threshold", "i8"),
        ("priority_preemption", "i8"),  # victim by (priority, arrival), as vLLM's priority policy
        ("order", "i8"),
        ("ahead", "i8"),  # asynchronous scheduling
        # Cost.
        ("slowdown", "f8"),  # factor on the duration of each step
        ("fixed_s", "f8"),
        ("sequence_s", "f8"),
        ("pair_s", "f8"),
        ("context_s", "f8"),
        ("local_cost_at", "i8"),  # f8 (tokens + 1,)
        ("moe_cost_at", "i8"),  # f8 (tokens + 1,)
        ("prefill_tokens_per_s", "f8"),
        ("decode_step_s", "f8"),
        # Expert model; without one there are no tasks.
        ("group", "i8"),  # its EP group
        ("tasks", "i8"),
        ("task_decoding_at", "i8"),  # i8 (tasks,) decoding requests
        ("task_tokens_at", "i8"),  # f8 (tasks,) tokens of the running step
        # Scheduler state.
        ("tick", "i8"),  # steps begun and completed
        ("next_finish", "i8"),  # tick at which the first decoding request finishes
        ("decoding", "i8"),
        ("context", "i8"),  # tokens of all decoding requests
        ("blocked", "i8"),  # the head of the queue did not fit and nothing has changed since
        ("ordered", "i8"),  # external keys are valid for the next scheduling
        ("picked", "i8"),  # the waiting request that an agent has chosen to be next
        ("pick_budget", "i8"),  # token budget left while it chooses, NONE when it does not
        ("pick_steady", "i8"),
        ("queue_head", "i8"),
        ("queue_tail", "i8"),
        ("front", "i8"),  # preempted requests, served before the queue of a policy
        ("heap", "i8"),
        ("preempted_count", "i8"),  # in the last step
        ("step_tokens", "i8"),
        ("step_local_s", "f8"),  # duration of the step without MoE layers
        ("rows_free", "i8"),
        ("running_at", "i8"),  # i4 (S,) running requests in admission order
        ("scheduled_at", "i8"),  # i4 (S,) their tokens in the running step
        ("preempted_at", "i8"),  # i4 (S,) requests preempted by the running step
        ("phases_at", "i8"),  # i4 (block size,) number of decoding requests by the tick at which they need a block
        (
            "end_of_at",
            "i8",
        ),  # i8 (S,) tick at which each decoding request finishes, beside its place on the running list
        ("phase_of_at", "i8"),  # i4 (S,) that phase of each running request, NONE while it does not decode
        # Scheduling ahead only, see ahead.py. `activity` is that of the scheduled step, not of the running one.
        ("flight", "i8"),
        ("step_end_s", "f8"),  # of the running step
        ("firsts", "i8"),
        ("firsts_at", "i8"),  # i4 (S,) requests whose first token the running step computes
        ("leaving", "i8"),
        ("leaving_at", "i8"),  # i4 (S,) requests whose last token it computes, in running order
        ("leaving_place_at", "i8"),  # i4 (S,) running requests before each of them, NONE for one that was preempted
        ("starved", "i8"),  # the running step leaves out decoding requests
        ("drained", "i8"),  # lockstep: nothing was scheduled ahead, so that the rank runs a dummy batch
        # Prefix caching only.
        ("blocks_at", "i8"),  # BLOCK (B,) by number
        ("numbered", "i8"),  # numbers that were ever given
        ("returned", "i8"),  # of them, those that no block has now
        ("returned_at", "i8"),  # i4 (B,) stack of them
        ("unhashed", "i8"),  # free blocks without hash, used before all others
        ("free_at", "i8"),  # i4 (free_mask + 1,) ring of free hashed blocks in order of reuse, see blocks.py
        ("free_mask", "i8"),
        ("free_head", "i8"),
        ("free_entries", "i8"),  # holes included
        ("findable", "i8"),  # running requests that have, or will have, blocks in the hash table
        ("table_used", "i8"),  # the hash table is initialised, and may hold blocks
        ("table_mask", "i8"),  # H - 1
        ("table_keys_at", "i8"),  # i8 (H,) hash table, open addressing
        ("table_blocks_at", "i8"),  # i4 (H,)
        ("block_tables_at", "i8"),  # i4 (S, row_length)
        ("row_length", "i8"),
        ("rows_at", "i8"),  # i4 (S,) stack of free rows of the block tables
        # Fairness among users, if the request policy asks for it; the last user is the unknown one.
        ("served_at", "i8"),  # f8 (users + 1,) virtual counters
        ("queued_at", "i8"),  # i4 (users + 1,) waiting requests
        ("last_admitted", "i8"),  # user of the last request that left the queue
        # Exact integrals over time up to integral_s, for rewards.
        ("integral_s", "f8"),
        ("integral_prefill", "f8"),
        ("integral_inflight", "f8"),
        ("integral_tpot", "f8"),
        ("tpot_rate", "f8"),  # sum of 1 / (output - 1) over decoding requests
        # Statistics.
        ("busy_s", "f8"),
        ("steps", "i8"),
        ("computed_tokens", "i8"),
        ("preemptions", "i8"),
        ("cache_queries", "i8"),
        ("cache_hits", "i8"),
        ("finished", "i8"),
        ("peak_blocks", "i8"),
    ],
    align=True,
)

CLUSTER = np.dtype(
    [
        ("now_s", "f8"),
        ("seed", "i8"),
        ("lockstep", "i8"),
        ("step_s", "f8"),  # lockstep: end of the step of all ranks
        # Lockstep: 0 no step, 1 it runs, 2 it is to begin, 3 it has begun and the next one is to be scheduled.
        ("stepping", "i8"),
        ("step_end_s", "f8"),  # lockstep, scheduling ahead: end of the step that has begun
        ("external_dispatch", "i8"),
        ("pending", "i8"),  # request that waits for a dispatch decision
        ("engine_nan", "i8"),  # the compiled engine policy gave no number, only NaN
        ("request_nan", "i8"),  # the compiled request policy gave NaN
        ("next_root", "i8"),
        ("later", "i8"),  # entries of the heap of later arrivals
        ("finished", "i8"),
        ("arrived", "i8"),
        ("last_engine", "i8"),
        ("closed_loop", "i8"),
        ("shortest_think_s", "f8"),
        ("telemetry_period_s", "f8"),
        ("telemetry_lag_s", "f8"),
        ("telemetry_count", "i8"),
        ("affinity_shown", "i8"),  # the view shows homes
        ("hits_shown", "i8"),
        ("shown_snapshot", "i8"),  # number of the snapshot that the view shows
        ("order_engine", "i8"),
        ("groups_at", "i8"),  # EXPERTS, one in lockstep, else one per engine; 0 without an expert model
        ("placement_group", "i8"),  # the group that waits for its expert policy
        ("placement_s", "f8"),  # since when
        ("stranded", "i8"),  # head of the list of requests that found no engine
        ("oracle", "i8"),  # the request policy is granted true output lengths
        ("dispatch_oracle", "i8"),  # the engine policy is granted true unfinished work
        ("serving", "i8"),  # users are charged for what they are served
        ("prompt_weight", "f8"),
        ("output_weight", "f8"),
        ("user_count", "i8"),
        ("charges_at", "i8"),  # f8 (users + 1,) prompts of earlier waiting requests, while a queue is read
        ("recording", "i8"),
        ("totals_s", "f8"),  # time up to which the reward integrals were last added up
        ("totals_at", "i8"),  # f8 (R, 3) reward integrals at the arrival of each request, while recording
        ("event_count", "i8"),
        ("logging", "i8"),
        ("engine_count", "i8"),
        ("root_count", "i8"),
        ("prefix_block_tokens", "i8"),
        ("telemetry_depth", "i8"),
        ("requests_at", "i8"),  # REQUEST (R,)
        ("engines_at", "i8"),  # ENGINE (N,)
        ("event_s_at", "i8"),  # f8 (N,) end of each engine's step, or the time of its next scheduling
        ("snapshot_s_at", "i8"),  # f8 (N,) time of the snapshot that the view shows of each engine
        ("changed_at", "i8"),  # i4 (N,) engines whose counters have changed since they were last shown
        ("changed_count", "i8"),
        ("roots_at", "i8"),  # i4 open-loop requests by arrival
        ("later_s_at", "i8"),  # f8 (R,) binary heap of later arrivals: follow-ups and re-dispatches
        ("later_at", "i8"),  # i4 (R,)
        ("events_at", "i8"),  # i4 (2 R,) first tokens (2 r) and ends (2 r + 1), for hooks of policies
        ("prefix_start_at", "i8"),  # i8 (R + 1,)
        ("prefix_ids_at", "i8"),  # i8
        ("telemetry_at", "i8"),  # TELEMETRY (depth, N), a ring of snapshots
        ("user_engine_at", "i8"),  # i4 last engine by user
        ("session_engine_at", "i8"),  # i4 last engine by session
        # The router's prefix index, see prefix_index.py.
        ("indexing", "i8"),
        ("index_block_tokens", "i8"),
        ("index_capacity", "i8"),
        ("index_max_match", "i8"),
        ("index_ttl_s", "f8"),
        ("prefix_key_blocks", "i8"),
        ("index_mask", "i8"),
        ("index_slots_at", "i8"),  # i4 (index_mask + 1,) hash table of the first nodes of chains
        ("index_nodes_at", "i8"),  # INDEX_NODE (N, index_capacity)
        ("index_lru_at", "i8"),  # INDEX_LRU (N,)
        ("engine_view_at", "i8"),  # f8 (N, ENGINE_COLUMNS), column by column, view of the pending decision
        ("request_row_at", "i8"),  # f8 (REQUEST_COLUMNS,)
        ("scores_at", "i8"),  # f8 (N,)
        ("queue_row_at", "i8"),  # f8 (QUEUE_COLUMNS,)
        ("context_row_at", "i8"),  # f8 (CONTEXT_COLUMNS,)
        ("engine_params_at", "i8"),  # f8
        ("request_params_at", "i8"),  # f8
        ("engine_param_count", "i8"),
        ("engine_score_at", "i8"),  # compiled engine policy, see compile.py
        ("request_key_at", "i8"),  # compiled request policy
        ("request_param_count", "i8"),
    ],
    align=True,
)

# Valid only while the block is in the hash table.
BLOCK = np.dtype(
    [
        ("hash", "i8"),
        ("refs", "i4"),
        ("twin", "i4"),  # next block of the same hash, in order of insertion
        ("position", "i4"),  # in the free queue, while nobody refers to the block
    ],
    align=True,
)

TELEMETRY = np.dtype(
    [
        ("time_s", "f8"),
        ("waiting", "i8"),
        ("running", "i8"),
        ("kv_usage", "f8"),
        ("moe_pressure", "f8"),
        ("dispatched", "i8"),
    ],
    align=True,
)

# The experts of one EP group, see kernel/experts. L layers, E experts, P slots, K ranks, T tasks, G engines,
# B batch sizes, W window buckets.
EXPERTS = np.dtype(
    [
        ("layers", "i8"),
        ("experts", "i8"),
        ("slots", "i8"),
        ("ranks", "i8"),
        ("top_k", "i8"),
        ("tasks", "i8"),
        ("engines", "i8"),
        ("first_engine", "i8"),
        ("ranks_per_engine", "i8"),
        ("sampled", "i8"),
        ("returning", "i8"),  # tokens return to their source rank after each layer
        # Cost of one layer, in seconds.
        ("expert_s", "f8"),  # per activated expert of a rank
        ("compute_at", "i8"),  # f8 by load of a rank times compute_scale
        ("compute_size", "i8"),
        ("compute_scale", "f8"),
        ("exchange_at", "i8"),  # f8 of all layers, by tokens of a rank under uniform routing
        ("exchange_size", "i8"),
        ("exchange_factor", "f8"),  # above 1 while a transfer of experts shares the links
        ("uniform_traffic", "f8"),  # remote ranks that a token goes to under uniform routing
        # Placement.
        ("slot_expert_at", "i8"),  # i4 (L, P)
        ("replicas_at", "i8"),  # i4 (L, E)
        ("expert_slots_at", "i8"),  # i4 (L, E, most_replicas)
        ("most_replicas", "i8"),
        # What tokens of each task do under the placement, per token.
        ("popularity_at", "i8"),  # f8 (T, L, E) experts chosen
        ("share_at", "i8"),  # f8 (L, K, T) experts chosen on a rank
        ("second_at", "i8"),  # f8 (L, K, T) their square
        ("arrive_at", "i8"),  # f8 (L, K, T) dispatch: arrivals at a rank. A returning token's arrive if it is elsewhere
        ("leave_at", "i8"),  # f8 (L, K, T) dispatch: departures. A returning token's leave if it is here
        ("combine_arrive_at", "i8"),  # f8 (L, K, T) the same of combine, the mirror of dispatch for returning tokens
        ("combine_leave_at", "i8"),  # f8 (L, K, T)
        # The same for the mix of tasks that the tables were made for.
        ("mix_at", "i8"),  # f8 (T,) running mix
        ("table_mix_at", "i8"),  # f8 (T,)
        ("active_at", "i8"),  # f8 (L, B, K) activated experts
        ("active_excess_at", "i8"),  # f8 (L, B) E[max] / max E over ranks
        ("load_excess_at", "i8"),  # f8 (L, B)
        # The running step.
        ("step_tasks_at", "i8"),  # f8 (T,)
        ("source_tasks_at", "i8"),  # f8 (G, T)
        ("slot_load_at", "i8"),  # f8 (L, P), sampled, as the next
        ("traffic_at", "i8"),  # f8 (4, L, K) arrivals and departures of dispatch, then of combine
        ("touched_at", "i8"),  # i8 (top_k,) ranks that a token goes to
        # Sampled routing.
        ("bank_at", "i8"),  # u2 (bank tokens, L, top_k)
        ("bank_tokens", "i8"),
        ("chunk_sample", "i8"),  # most tokens of a prefill chunk that are routed one by one
        # Load window.
        ("bucket_steps", "i8"),
        ("bucket_steps_at", "i8"),  # i8 (W,) steps in each bucket
        ("window_at", "i8"),  # f8 (W, G, T) tokens
        ("counts_at", "i8"),  # f8 (W, G, L, E) experts chosen, sampled only
        # Re-placement.
        ("steps", "i8"),
        ("next_placement", "i8"),  # the step before which the expert policy is asked
        ("stall_s", "f8"),  # that the next step begins with
        # Statistics.
        ("rank_load_at", "i8"),  # f8 (K,) running average
        ("imbalance_sum", "f8"),  # over steps: mean over layers of heaviest rank over mean
        ("balancedness_sum", "f8"),  # the same of mean over heaviest
        ("experts_s", "f8"),
        ("exchange_s", "f8"),
    ],
    align=True,
)
# A block that the router believes to be in the prefix cache of an engine.
INDEX_NODE = np.dtype(
    [
        ("key", "i8"),
        ("time_s", "f8"),  # of its last use
        ("engine", "i4"),
        ("chain", "i4"),  # next node of the same key
        ("older", "i4"),
        ("newer", "i4"),
    ],
    align=True,
)

INDEX_LRU = np.dtype(
    [("oldest", "i4"), ("newest", "i4"), ("count", "i4"), ("matched", "i4")],  # matched: blocks of the last match
    align=True,
)
