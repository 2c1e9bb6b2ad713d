"""Which fine-tuning examples cause a behaviour, and what happens when they go.

    import concept_tda as ct
    lm = ct.load_model("smollm2-135m-instruct")

Every public name of every room is reachable from here. A room is imported when one of its names is first used,
so that `import concept_tda` itself costs nothing."""

__version__ = "0.1.0"

from difflib import get_close_matches as _get_close_matches
from importlib import import_module as _import_module

# --- table of public names: written by tools/public_names.py ---
_PUBLIC = {
    "storage": "ConceptTDAError StorageError MissingExtraError require fingerprint code_version cache_folder "
        "atomic_file BlockStore",
    "conversations": "ConversationError Conversation Conversations load_conversations bundled "
        "TokenizedConversation readable_tokens TokenizedConversations tokenize tokenize_prompts Batch batches",
    "models": "BUILT_IN ModelError LayerError SiteError LanguageModel load_model Site resolve_sites",
    "tracing": "POOLINGS TracingError pooling_weights pooled_activations token_activations generate",
    "concepts": "ConceptError Concept random_directions separation contrastive_concept probe_concept "
        "tensor_concept random_concepts LayerSweep sweep_layers",
    "attribution": "SIGN LEVELS VIEW_STYLE FORMAT_VERSION AttributionError rank_scores score_percentiles spearman "
        "cut_rows detection_metrics Cost QueryCard visible_text safe_text colour_limit legend_html "
        "conversation_html card_html histogram_svg Attribution prompt_text example_html examples_html "
        "attribution_html load_attribution table_html Comparison comparison_html compare",
    "gradients": "GradientError response_logits token_losses loss_weights site_flows SiteGradients watch_layers "
        "hidden_states",
    "curvature": "CurvatureError Identity Factors EKFAC",
    "queries": "Query ConceptQuery LossQuery QueryExpression query_expression",
    "directional": "Readout ActivationReadout ActivationGradientReadout LossReadout DirectionReadout "
        "StackedReadout ForwardReadout difference_scale DifferenceReadout EngineError direction_readout "
        "difference_adapters Pass shared_pass",
    "scorers": "ScorerError Scorer score_together VectorFilter ActivationGradient cached_generate "
        "ProjectionDifference dataset_projection_difference Influence ConceptInfluence InfluenceFunction GradDot",
    "baselines": "RandomScore ResponseLength BM25 MeanLoss RepSim RandomDirection",
    "finetuning": "PRECISIONS RECIPES FinetuneError finetune training_record Retrained finetune_many "
        "training_checkpoints",
    "preconditioners": "DataInf LoGra GaussNewton ConjugateGradient",
    "neighbours": "CosineReadout GradCos CheckpointScorer TracIn AdamMoments walsh_hadamard Sketch LessReadout "
        "LESS exact_rows estimated_recall Cascade",
    "atlas": "AtlasError InfluenceAtlas build_atlas GradientIndex build_index",
    "planning": "PlanError Plan plan Check Diagnosis doctor",
    "judges": "COHERENCE_PROMPT JudgeError Evaluation Judge ContrastJudge LossJudge AnswerJudge FunctionJudge "
        "expected_score LocalJudge integer_probabilities JudgeUsage OpenAIJudge",
    "personas": "PersonaError Trait traits load_trait persona_responses persona_concept SteeringError steer "
        "SteeringCheck steering_check",
    "experiments": "ExperimentError Experiment FilterAndRetrain ActivationJudge LinearDatamodelingScore "
        "CounterfactualPrediction TailPatch baseline_scorers MethodComparison ParetoCurve",
    "widgets": "MARKS WidgetError front_end near_duplicates percentiles_for_length null_z search_terms Review "
        "ExampleBrowser embedded_browser concept_reading ConceptView ConceptExplorer",
    "reports": "write_report",
    "cli": "",
}
# --- end of table ---

_ROOM_OF = {name: room for room, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_ROOM_OF]


def __getattr__(name):
    if name in _PUBLIC: return _import_module(f"{__name__}.{name}")
    if name in _ROOM_OF:
        value = getattr(_import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value
    close = [] if name.startswith("_") else _get_close_matches(name, [*_ROOM_OF, *_PUBLIC], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__():
    return sorted([*globals(), *_PUBLIC, *_ROOM_OF])
