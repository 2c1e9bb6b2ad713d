"""Which fine-tuning examples cause a behaviour, and what happens when they go.

    import concept_tda as ct
    lm = ct.load_model("smollm2-135m-instruct")

The names a user needs are here, in the order of the work. Everything else is a floor and a room away:
`ct.influence.curvature.Factors`. A room is imported when one of its names is first used, so that
`import concept_tda` itself costs nothing."""

__version__ = "0.1.0"

from concept_tda._lazy import front_door as _front_door
from concept_tda._registry import VIEWS as _VIEWS

_FRONT_DOOR = {
    "open": "load_model load_conversations bundled Conversation Conversations tokenize doctor plan",
    "behaviour": "contrastive_concept probe_concept tensor_concept persona_concept random_concepts "
        "sweep_layers Concept load_trait steer steering_check generate pooled_activations",
    "score": "VectorFilter ActivationGradient ProjectionDifference ConceptInfluence InfluenceFunction "
        "GradDot GradCos TracIn LESS SOURCE Cascade EKFAC resolve_sites score_together build_atlas "
        "build_index",
    "baselines": "RandomScore ResponseLength MeanLoss BM25 RepSim RandomDirection",
    "group": "load_sae read_features feature_groups column_groups score_groups",
    "look": "Attribution load_attribution compare ConceptExplorer write_report",
    "train and judge": "finetune ContrastJudge LossJudge FunctionJudge LocalJudge OpenAIJudge",
    "prove": "FilterAndRetrain ParetoCurve MethodComparison LinearDatamodelingScore CounterfactualPrediction "
        "TailPatch",
    "errors": "ConceptTDAError",
}

__all__ = [name for names in _FRONT_DOOR.values() for name in names.split()]
__getattr__, __dir__ = _front_door(__name__, __all__)

# Who draws what, and who does what a method of a lower floor promises (concept_tda.foundation.display).
# Names only: a view is imported when something is first shown.
_VIEWS.update({
    f"{__name__}.{thing}": f"{__name__}.views.{view}" for thing, view in {
        "foundation.display.Sheet": "html.show_sheet",
        "data.conversations.Conversation": "chats.show_conversation",
        "data.conversations.Conversations": "chats.show_conversations",
        "data.tokens.TokenizedConversations": "chats.show_tokens",
        "foundation.display.Facts": "html.show_facts",
        "results.cards.QueryCard": "html.show_card",
        "results.attribution.Attribution": "html.show_attribution",
        "results.attribution.Attribution.report": "report.write_report",
        "results.attribution.Attribution.inspect": "browser.ExampleBrowser",
        "groups.groups.GroupScores.inspect": "kinds.KindBrowser",
        "results.comparison.Comparison": "html.show_comparison",
        "results.comparison.Comparison.inspect": "movers.MoverBrowser",
        "influence.planning.Plan": "html.show_plan",
        "influence.doctor.Diagnosis": "html.show_diagnosis",
        "influence.doctor.MarkedExample": "html.show_marked",
    }.items()})
