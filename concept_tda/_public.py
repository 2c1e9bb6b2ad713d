"""Public names by room. Written by tools/public_names.py."""

PUBLIC = {
    "foundation.errors": "ConceptTDAError StorageError MissingExtraError check_whole require",
    "foundation.storage": "fingerprint code_version cache_folder write_error atomic_file check_free "
        "BlockStore",
    "foundation.probes": "ProbeError bfloat16_ratio give_back_memory",
    "foundation.display": "visible_text safe_text one_line DisplayError register_view html_of act Table "
        "Sheet Facts",
    "foundation.processes": "ProcessError n_ranks rank on_its_own wait_for_all by_first own_share "
        "clear_together in_processes",
    "foundation.offloading": "computes_on is_sharded fetched weights_of lost away put_apart fetched_again "
        "present stand_ins",
    "data.messages": "PASSED_ON REFUSED ConversationError shortened listing kind_of says_nothing Turn "
        "read_message check_turns",
    "data.layouts": "LAYOUTS ANSWERS REFUSED_COLUMNS SYSTEM_COLUMNS WRITTEN Layout is_message_row "
        "chats_of_rows Chat read_chats layout_records",
    "data.files": "COMPRESSIONS FORMATS TEXT_FORMATS Record plain table_records parse_json arrow_reader "
        "is_data_file bare_name read_file is_text_file read_text",
    "data.conversations": "Conversation row_numbers Rows Conversations source_records load_conversations "
        "bundled",
    "data.templates": "template_names chat_template_text as_given render TemplateProfile Rendered "
        "rendered_chats",
    "data.tokens": "KINDS response_mask encoded_texts TokenizedConversation readable_tokens token_kinds "
        "TokenizedConversations tokenize tokenize_prompts",
    "data.batches": "Batch batch_of batches",
    "data.preferences": "Pair Preferences load_preferences",
    "data.documents": "DocumentError Document Piece Window Windows Documents load_documents as_examples "
        "load_windows examples_from_columns token_windows number_tokenizer",
    "data.masks": "MaskError tokenizer_record token_mark TokenMask token_mask chosen_tokens",
    "data.stories": "TRIGGER PAYLOAD StoryError story_conversations story_tokenizer",
    "model.loading": "BUILT_IN ModelError LayerError SiteError LanguageModel check_in_one_piece "
        "SlowTypeWarning load_model check_loaded",
    "model.sites": "Site Slice chosen Unit layers_of on_whole_layers is_quantised Coverage coverage "
        "coverage_notes resolve_sites",
    "model.losses": "GradientError predicted_mask response_logits cross_entropy_in_place token_losses "
        "loss_weights",
    "model.tracing": "POOLINGS TracingError pooling_weights work_dtype progress_bar pooled_activations "
        "layer_activations token_activations left_padded as_prompts generate",
    "model.answers": "answer_records with_record cached_generate",
    "model.finetuning": "GRADIENT_CLIP RECIPES FinetuneError example_losses own_randomness new_adapters "
        "step_rows step_rate write_training_record finetune run_settings training_record example_prints "
        "RunExamples Retrained finetune_many training_checkpoints run_beginning run_segments is_model_in "
        "check_of_run",
    "model.training": "TrainingError TrainingRecipe StepPlan first_plan TrainingRun train replay load_run",
    "model.tiny": "FAMILIES tiny_tokenizer tiny_model tiny_pair",
    "model.servers": "ServerError ServedModel",
    "model.local_server": "LocalServer",
    "model.exports": "ExportError ExportedActivations load_activations export_activations "
        "export_remote_activations",
    "model.recording": "RecordingError TrainingRecorder",
    "results.metrics": "AttributionError rank_scores score_percentiles percent_text share_text spearman "
        "check_one_criterion checked_count cut_rows detection_metrics moderated_variances interval_reach",
    "results.cards": "ZERO STEPS ACCESS Cost Null expected_counts QueryCard",
    "results.attribution": "FORMAT_VERSION question_text prompt_text Leading sentence Prediction Attribution "
        "load_attribution",
    "results.duplicates": "near_duplicates",
    "results.comparison": "Comparison results_by_name compare",
    "results.calibration": "foretold Calibration ensemble combined",
    "results.folders": "write_part summary joined write_manifest ScoreFolder",
    "results.advice": "Finding Advice about_the_same advice",
    "concepts.concept": "ConceptError Concept check_concept random_directions separation contrastive_concept "
        "probe_concept tensor_concept random_concepts LayerSweep sweep_layers",
    "concepts.judges": "COHERENCE_PROMPT JudgeError Evaluation Judge last_answer_only ContrastJudge "
        "LossJudge AnswerJudge FunctionJudge expected_score LocalJudge integer_probabilities JudgeUsage "
        "OpenAIJudge OpenAIReader",
    "concepts.personas": "PersonaError Trait traits load_trait persona_responses persona_concept "
        "SteeringError steer SteeringCheck steering_check",
    "concepts.crosscoders": "TENSORS CrosscoderError source_number Crosscoder CrosscoderRecipe "
        "CrosscoderLosses crosscoder_losses Normalisation measure_normalisation train_crosscoder "
        "crosscoder_quality PairedActivations paired_activations load_paired_activations aligned_activations "
        "difference_of_means differences difference_sae",
    "concepts.diffing": "RANKINGS DiffingError LatentSide PairedLatents pair_codes read_pair latent_scaling "
        "RankingClaim decoder_turn norm_difference DifferenceLatents read_difference StagedLatents "
        "noise_contour LatentRanking novel_latents exclusive_share",
    "concepts.stages": "PLANS STAGES StagesError StagePlan FiringText Stages",
    "influence.gradients": "require_grad went_in by_example site_flows SiteGradients check_sites "
        "watch_layers Reached hidden_states",
    "influence.curvature": "CurvatureError Identity check_damping check_gradients check_moved check_labels "
        "fitting_record DampedCurvature Factors labelled_pass LabelDraws batch_labels FactorStatistics EKFAC",
    "influence.preconditioners": "DataInf LoGra GaussNewton ConjugateGradient",
    "influence.queries": "Query ConceptQuery LossQuery MarginQuery ContrastQuery TokenQuery WeightedQuery "
        "within_questions cut_notes QueryExpression query_expression",
    "influence.engine": "EngineError Readout ActivationReadout ActivationGradientReadout LossReadout "
        "DirectionReadout StackedReadout without_first_token NormalisedReadout adding_tangent ForwardReadout "
        "difference_scale moved_weights DifferenceReadout direction_readout difference_adapters Stopwatch "
        "run_batch Pass peak_memory shared_pass",
    "influence.scorers": "ScorerError NullReadout sign_flips null_directions Scorer equal_as_first "
        "query_card score_together VectorFilter ActivationGradient ProjectionDifference "
        "dataset_projection_difference Influence strangers_note ConceptInfluence InfluenceFunction GradDot",
    "influence.neighbours": "RESIDUAL_FORMS GradCos ResidualChangeReadout ResidualChange CheckpointScorer "
        "TracIn AdamMoments recorded_moments walsh_hadamard Sketch LessReadout LESS exact_rows "
        "estimated_recall Cascade",
    "influence.baselines": "RandomScore ResponseLength BM25 MeanLoss RepSim RandomDirection",
    "influence.atlas": "AtlasError DirectionRows PartRows InfluenceAtlas build_atlas GradientIndex "
        "build_index",
    "influence.planning": "PlanError Plan plan TrainingPlan plan_training",
    "influence.doctor": "SEVERITIES PARTS SIGNS DoctorError Check MarkedExample Diagnosis doctor",
    "influence.pairs": "PairAttribution score_preferences is_of_pairs load_pair_attribution",
    "influence.runs": "RunError adamw_step TrainingInfluence",
    "influence.streaming": "stream_records score_stream PartScorer score_on_ray",
    "influence.served": "ServedError ServedQuery write_query load_query ServedCheck ServedInfluence",
    "influence.responses": "gradient_size Unrolled SOURCE AdamResponse",
    "influence.sets": "SetError stepwise stepwise_change newton_change",
    "influence.pricing": "Counts count_operations operations_per_token fit_operations_per_token "
        "seconds_per_token plan_model",
    "influence.surrogates": "Surrogate",
    "influence.other_tools": "OtherToolError load_kronfluence_scores load_bergson_scores "
        "load_kronfluence_factors",
    "groups.groups": "GROUP_ORDERS LABEL_COLOURS GroupError Groups column_groups family_groups "
        "cluster_groups GroupScores score_groups union_rows drop_groups coverage_curve compare_groups "
        "random_groups",
    "groups.sae": "SAEError SparseAutoencoder load_sae check_sae read_tokens train_sae SAEQuality "
        "sae_quality spliced random_sae recurrence",
    "groups.features": "FeatureError Features read_features load_features feature_groups feature_concept "
        "top_contexts",
    "groups.reading": "ReadingError WordCounts count_words distinguishing_words EndWords words_of_ends "
        "logit_lens nearest_features",
    "groups.discovery": "DiscoveryError Movement movement Atoms sparse_atoms Discovery discover "
        "effect_groups movement_check",
    "groups.labels": "LabelError held_out detection_score Reader Labels label_groups ranking_ends",
    "groups.maps": "map_places training_map",
    "groups.latents": "LatentError rank_latents LatentQuery",
    "groups.origins": "AGGREGATES OriginError latent_origins Origins",
    "groups.neuronpedia": "NeuronpediaError read_neuronpedia beside_neuronpedia",
    "mechanisms.circuits": "CircuitError Head heads head neurons slice_of attention_patterns "
        "previous_token_weights induction_weights head_scores random_sequences repeated_sequences "
        "PreviousTokenProbe InductionProbe copy_targets CopyProbe CustomProbe UnitEKFAC UnitInfluence",
    "mechanisms.emergence": "ARMS INSERTING icl_score CircuitCurves circuit_curves plot_curves "
        "EmergenceExperiment EmergenceResult plot_emergence",
    "mechanisms.motifs": "Measure TOKEN_STATISTICS TEXT_STATISTICS PROGRAMS MotifError repeated_share "
        "longest_repeat text_statistics token_statistics example_statistics JointModel Motifs find_motifs "
        "plot_motifs Program Generator programs_for propose_program",
    "mechanisms.tails": "top_share tail_curve plot_tail shared_tops plot_shared",
    "mechanisms.latent_units": "Latent latent_units",
    "mechanisms.policies": "REFUSALS CONSTANT THRESHOLD PolicyError last_user_token PolicyPrompts "
        "policy_pass read_policy PolicyFeatures sae_features concept_features standardised_features "
        "feature_gaps ridge_weights Policy fit_policy",
    "mechanisms.policy_shifts": "weight_shift PolicyQuery Shifts PolicyShift",
    "evidence.retraining": "TRAINING PLAN_FORMAT Judges ExperimentError full_recipe Maker tokenized_whole "
        "Retraining claim read_record write_record Cells CellFolder packed_record read_packed PackedCells "
        "relative_paths judges_by_name Experiment",
    "evidence.subsets": "Attributions Subset share_count random_rows all_but checked_seeds places_of "
        "refuse_pairs aligned_scores subset_rows",
    "evidence.statistics": "evaluation_mean paired_change t_interval welch_interval spearman_interval "
        "with_intervals fitted_line",
    "evidence.figures": "COLOURS finished",
    "evidence.filter_and_retrain": "FilterAndRetrain",
    "evidence.datamodels": "Removal ActivationJudge LinearDatamodelingScore CounterfactualPrediction related "
        "left_out calibrate",
    "evidence.tail_patch": "Step TailPatch",
    "evidence.method_comparison": "Scorers baseline_scorers scorer_key MethodComparison",
    "evidence.pareto": "ParetoCurve",
    "views.html": "ORANGE BLUE VIEW_STYLE page_part colour_limit ColourScale colour_scale legend_html "
        "conversation_html card_html histogram_svg result_histogram table_html sheet_html facts_html "
        "ScoreParts score_parts parts_html example_html examples_html end_titles attribution_html "
        "marked_html show_card show_sheet show_facts show_attribution show_comparison show_plan "
        "show_diagnosis show_marked",
    "views.contents": "BROWSER_SCRIPTS WidgetError front_end AnsweringWidget percentiles_for_length "
        "short_name Contents example_texts end_words browser_table browser_columns rounded_columns "
        "token_turns written_turns example_to_read snippet search_terms hits within from_both_ends "
        "json_in_script",
    "views.review": "MARKS review_head Review",
    "views.browser": "words_asker embedded_browser script_hash OfflinePage offline_page ExampleBrowser",
    "views.mixer": "concepts_by_name mixed_concept ConceptMixer",
    "views.explorer": "concept_reading ConceptView ConceptExplorer",
    "views.chats": "show_conversation show_conversations show_tokens",
    "views.kinds": "chosen_groups bar_svg kinds_html KindBrowser",
    "views.map": "MAP_SCRIPTS MapContents map_table map_columns report_map ExampleMap",
    "views.latents": "LATENT_SCRIPTS latent_table latents_svg LatentBrowser latents_html",
    "views.policies": "SHIFT_SCRIPTS quality_words shift_table shift_numbers shift_texts ShiftBrowser "
        "shifts_html",
    "views.report": "write_report",
    "views.movers": "MOVER_SCRIPTS card_differences mover_words mover_table mover_columns MoverBrowser",
    "commands.terminal": "app CONTINUES help_example plain_errors did_you_mean check_file check_model Told "
        "warnings_told typed_options refuse_unread check_out say_json typed command_line say_next",
    "commands.options": "BEHAVIOUR METHOD MODEL PAIRS TRAINING_PANEL option Given as_opened",
    "commands.results": "result_paths result_files read_results only_result examples_text print_ends",
    "commands.methods": "METHODS CURVATURES FORMS GOVERNED Method Asked chosen_methods every_method "
        "check_needs layer_number check_behaviour check_word check_asked options_of unread_options Read "
        "read_files contrast_of Opened fit_curvature open_all make_scorers typed_line",
    "commands.scoring": "score_asked ReplayError",
    "commands.preparing": "training_settings training_again",
    "commands.reading": "",
    "commands.filtering": "",
    "commands.proving": "",
    "demo": "last_state run_notebook",
    "cli": "",
}
