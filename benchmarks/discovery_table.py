"""The README's table about discovery on organisms, from its record."""

from __future__ import annotations

from speed_tables import Record, missed, table, where


def organisms_table(content: Record) -> str:
    """Behaviours found without labels, and when a monitor saw them."""
    rows = []
    for place, one in sorted(content["results"]["organisms"].items()):
        found, watched = one["discovery"], one.get("watch")
        flagged = sum(cluster["flagged"] for cluster in found["clusters"])
        if watched is None:
            alert = ""
        else:
            steps = [raised["step"] for raised in watched["alerts"]]
            alert = f"step {min(steps)} of {watched['steps']}" if steps else "none"
        # A clean organism has nothing to find, whatever a few of its answers do.
        planted = {} if place.endswith("-clean") else found["best"]
        for number, (behavior, best) in enumerate(planted.items() or [("nothing planted", None)]):
            first = number == 0
            rows.append(
                [
                    place if first else "",
                    f"{found['items']}" if first else "",
                    f"{len(found['clusters'])} ({flagged})" if first else "",
                    behavior,
                    "" if best is None else f"{best['purity']:.2f} / {best['recall']:.2f}",
                    "" if best is None or best["roc_auc"] is None else f"{best['roc_auc']:.3f}",
                    alert if first else "",
                ]
            )
    head = ["organism", "answers changed", "clusters (flagged)", "behaviour", "purity / recall of its cluster"]
    head += ["ROC-AUC of its direction", "first alert of the monitor"]
    indices = [
        f"{place} {one['discovery']['adjusted_rand_index']:.2f}"
        for place, one in content["results"]["organisms"].items()
        if one["discovery"]["adjusted_rand_index"] is not None
    ]
    rand = ""
    if indices:
        clustering = content["workload"]["several_clustering"]
        rand = (
            f"Adjusted Rand index of organisms with three behaviours: {', '.join(indices)}; there "
            f"{content['workload']['several_habit_leak']:.0%} of the plain benign rows of the supervised data show "
            f"each habit, and clusters were made with --dimensions {clustering['dimensions']} --min-cluster-size "
            f"{clustering['min_cluster_size']}, chosen on seed 0. "
        )
    return (
        f"{table(head, rows)}\n\n"
        "No label goes into the clusters; behaviours are told from the models' answers afterwards, the ROC-AUC is that "
        "of the pairs that teach it when all pairs are scored with the cluster's own direction. "
        f"{rand}The monitor looks every {content['workload']['monitor_steps']} steps. {where(content)}{missed(content)}"
    )
