from __future__ import annotations

from unfused.label import PBN, HiddenClassSearchCV, NCDKMeans, NCDSpectralClustering

pbn = PBN(n_clusters=3, latent_dim=4, epochs=4, random_state=0)
search = HiddenClassSearchCV(NCDKMeans(n_clusters=3), {"n_init": [1, 2]}, n_hidden_folds=2, random_state=0)

NARROW = "of the check's two columns the paper's widths, 3p/4 and p/2, leave a single unit"
RANDOM = "starts are drawn at random from the rows: repeated rows are other rows (scikit-learn's KMeans is exempted too)"

ESTIMATORS = [
    (pbn, {"check_clustering": NARROW}),
    (
        NCDKMeans(n_clusters=3, n_init=2, random_state=0),
        {"check_sample_weight_equivalence_on_dense_data": RANDOM},
    ),
    (NCDSpectralClustering(n_clusters=3, n_init=2, random_state=0), {}),
    (NCDSpectralClustering(n_clusters=2, cluster_rows="all", n_init=2, random_state=0), {}),
    (search, {}),
]
