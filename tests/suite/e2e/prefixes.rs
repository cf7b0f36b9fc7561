//! Sessions that start with the same tokens: what the hops computed for one of them is not computed for the next, of the same
//! client and tenant, and of nobody else.

use std::{path::Path, time::Duration};

use helion::{
    client::{
        Client, PeerRules,
        generation::{Generation, GenerationEvent, GenerationOptions},
        session::Patience,
    },
    engine::PAGE_TOKENS,
    model::Dtype,
    swarm::{
        Frame, PeerId, WireCodec,
        announcement::Announcement,
        prefix::{KEY_BYTES, MOST_KEYS},
        proto::session as proto,
        ticket::{SessionLimits, Ticket},
    },
};

use super::{
    faults::changed,
    harness::{HANG, Place, Server, client, fixture},
    sessions::{holds_nothing, info},
    strangers::{Stranger, foreign_step, frame, ticket},
};

/// A prompt that looks like no other with another `seed`.
fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|token| (token * 37 + token * token * 11 + seed * 101 + 5) % 500 + 3).collect()
}

fn options(max_tokens: usize, tenant: Option<&str>) -> GenerationOptions {
    let tenant = tenant.map(ToOwned::to_owned);
    GenerationOptions { max_tokens, ignore_eos: true, prefill_chunk: 32, tenant, ..GenerationOptions::default() }
}

async fn generate(client: &Client, prompt: &[u32], options: &GenerationOptions) -> Generation {
    client.generate(prompt, options, &mut |_| {}).await.unwrap()
}

/// Tokens of the prompt that the hops held.
fn cached(generation: &Generation) -> usize {
    generation.usage.prompt_tokens_details.as_ref().map_or(0, |details| details.cached_tokens)
}

/// Waits until a node has heard that all its sessions are over, and so has kept what they left.
async fn has_no_sessions(client: &Client, node: &Server) {
    let deadline = tokio::time::Instant::now() + HANG / 2;
    while info(client, node).await.sessions > 0 {
        assert!(tokio::time::Instant::now() < deadline, "a session stays");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Rows that each node has computed.
async fn tokens(client: &Client, nodes: &[Server]) -> Vec<u64> {
    let mut tokens = Vec::new();
    for node in nodes {
        tokens.push(info(client, node).await.tokens);
    }
    tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_computes_only_what_is_new() {
    const NEW: usize = 6;
    let place = Place::new();
    let model = changed(&place, "llama", r#"{"max_position_embeddings": 2048}"#);
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let prompt = prompt(1, 900);
    let alone = generate(&client, &prompt, &options(NEW, None)).await;
    let before = tokens(&client, &nodes).await;
    let first = generate(&client, &prompt, &options(NEW, Some(""))).await;
    assert_eq!((&first.output_ids, cached(&first)), (&alone.output_ids, 0), "what had no tenant was not kept");
    let between = tokens(&client, &nodes).await;
    let second = generate(&client, &prompt, &options(NEW, Some(""))).await;
    let after = tokens(&client, &nodes).await;
    // 56 pages are full, and the rest of the prompt and all answers but the last are new.
    assert_eq!((&second.output_ids, cached(&second)), (&alone.output_ids, 896));
    let (full, rest) = ((900 + NEW - 1) as u64, (900 - 896 + NEW - 1) as u64);
    for (index, node) in nodes.iter().enumerate() {
        assert_eq!((between[index] - before[index], after[index] - between[index]), (full, rest));
        assert_eq!(info(&client, node).await.prefix_tokens_reused, 896);
    }
    // The best of three, as the machine may be busy.
    let to_first = |generation: &Generation| generation.timing.time_to_first_token_ms;
    let (mut was, mut is) = (to_first(&first), to_first(&second));
    for seed in [11, 12] {
        let prompt = self::prompt(seed, 900);
        let (first, second) = (
            generate(&client, &prompt, &options(1, Some(""))).await,
            generate(&client, &prompt, &options(1, Some(""))).await,
        );
        assert_eq!((cached(&first), cached(&second)), (0, 896));
        (was, is) = (was.min(to_first(&first)), is.min(to_first(&second)));
    }
    eprintln!("time to first token: {was:.1} ms, then {is:.1} ms");
    assert!(is < 0.15 * was, "{was} ms, then {is} ms");

    // The next turn of a chat: what was answered is there as well, but for the last page that it has not filled.
    has_no_sessions(&client, &nodes[0]).await;
    let said = [&prompt[..], &second.output_ids, &self::prompt(2, 40)].concat();
    let turn = generate(&client, &said, &options(24, Some(""))).await;
    assert_eq!(cached(&turn), (900 + NEW - 1) / PAGE_TOKENS * PAGE_TOKENS);
    let next = [&said[..], &turn.output_ids, &self::prompt(3, 9)].concat();
    for node in &nodes {
        has_no_sessions(&client, node).await;
    }
    assert_eq!(cached(&generate(&client, &next, &options(1, Some(""))).await), 960, "969 tokens were held");

    // Nobody but the tenant gains by it, and what the pages depend on is the same or nothing is.
    assert_eq!(cached(&generate(&client, &prompt, &options(1, Some("another tenant"))).await), 0);
    let packed = client.clone().with_wire_codec(WireCodec::Q8);
    assert_eq!(cached(&generate(&packed, &prompt, &options(1, Some(""))).await), 0);
    assert_eq!(cached(&generate(&packed, &prompt, &options(1, Some(""))).await), 896);
    for node in &nodes {
        holds_nothing(&client, node).await;
    }
}

/// Every family, cut in two: reused, and equal.
async fn reuses(model: &Path, blocks: usize) {
    let place = Place::new();
    let (first, second) = ("0:2", format!("2:{blocks}"));
    let (bootstrap, nodes) = place.swarm(model, &[first, &second], &[]);
    let client = client(model, &bootstrap, Patience::default()).await;
    let long = prompt(7, 200);
    let alone = generate(&client, &long, &options(9, None)).await.output_ids;
    for expected in [0, 192] {
        let generation = generate(&client, &long, &options(9, Some(""))).await;
        assert_eq!((&generation.output_ids, cached(&generation)), (&alone, expected));
    }
    // Of a prompt that is held to its end only the last token is computed.
    let whole = &long[..192];
    let alone = generate(&client, whole, &options(9, None)).await.output_ids;
    let depends_on_length = client.model().spec().length_class(192) != client.model().spec().length_class(200);
    let generation = generate(&client, whole, &options(9, Some(""))).await;
    assert_eq!(cached(&generation), if depends_on_length { 0 } else { 191 });
    assert_eq!(generation.output_ids, alone);
    for node in &nodes {
        holds_nothing(&client, node).await;
    }
}

macro_rules! every_family {
    ($($name:ident: $family:literal, $blocks:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            reuses(&fixture($family), $blocks).await;
        }
    )*};
}

every_family! {
    bloom: "bloom", 6;
    falcon_new: "falcon-40b-style", 6;
    falcon_old: "falcon-7b-style", 6;
    falcon_alibi: "falcon-rw-style", 6;
    gemma3: "gemma3", 7;
    gemma3_text: "gemma3_text", 7;
    gpt_oss: "gpt_oss", 4;
    llama: "llama", 6;
    mistral: "mistral", 6;
    mixtral: "mixtral", 4;
    phi: "phi", 6;
    phi3: "phi3", 6;
    qwen2: "qwen2", 6;
    qwen3: "qwen3", 6;
    qwen3_moe: "qwen3_moe", 4;
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_that_depend_on_the_length_are_reused_for_equal_ones() {
    let place = Place::new();
    let dynamic = r#"{"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 20.0}}"#;
    reuses(&changed(&place, "llama", dynamic), 6).await;
    let place = Place::new();
    let longrope = r#"{"original_max_position_embeddings": 196, "partial_rotary_factor": 0.75, "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0]}}"#;
    // The shorter prompt grows past the length above which all positions change.
    reuses(&changed(&place, "phi3", longrope), 6).await;
}

/// A hop is lost after all of them began with what they held; or it leaves, by SIGTERM.
async fn one_loss(hop: usize, at: Option<usize>, signal: &str, node_args: &[&str]) {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6", "0:2", "2:4", "4:6"], node_args);
    let ids: Vec<PeerId> = nodes[..3].iter().map(|node| node.peer_id.parse().unwrap()).collect();
    let rules = PeerRules { route: ids, ..PeerRules::default() };
    let client = client(&model, &bootstrap, Patience::default()).await.with_rules(rules);
    let prompt = prompt(3, 210);
    let expected = generate(&client, &prompt, &options(12, Some(""))).await.output_ids;
    let before = tokens(&client, &nodes).await;
    let mut seen = 0;
    let mut kill = |event| {
        let now = match event {
            GenerationEvent::Route { .. } => None,
            GenerationEvent::Token { .. } => {
                seen += 1;
                Some(seen)
            }
            GenerationEvent::Recovery { .. } => return,
        };
        if now == at {
            nodes[hop].running.signal(signal);
        }
    };
    let generation = client.generate(&prompt, &options(12, Some("")), &mut kill).await.unwrap();
    assert_eq!((&generation.output_ids, generation.recoveries, cached(&generation)), (&expected, 1, 208));
    let forgets = node_args.contains(&"--history-bytes");
    for (index, node) in nodes.iter().enumerate().filter(|(index, _)| *index != hop) {
        let info = info(&client, node).await;
        let (rows, told, taken) = (info.tokens - before[index], info.tokens_replayed, info.tokens_taken_over);
        if index == hop + 3 {
            assert_eq!(rows + told + taken, 210 + 11, "the new hop has all of it once");
            assert!(if signal == "TERM" { told == 0 && taken >= 208 } else { told >= 208 && taken == 0 });
        } else if index < 3 && !forgets {
            assert_eq!((rows, told), (2 + 11, 0), "hop {index} computes what is new, once");
        }
        holds_nothing(&client, node).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_hop_is_lost_behind_a_prefix() {
    one_loss(0, Some(4), "KILL", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_middle_hop_is_lost_behind_a_prefix() {
    one_loss(1, Some(4), "KILL", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_hop_is_lost_behind_a_prefix() {
    one_loss(2, Some(1), "KILL", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hop_is_lost_between_the_prefix_and_the_first_step() {
    for hop in 0..3 {
        one_loss(hop, None, "KILL", &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hop_that_leaves_hands_over_what_the_session_began_with() {
    one_loss(1, None, "TERM", &[]).await;
    one_loss(0, Some(4), "TERM", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_whose_history_had_no_room_is_rebuilt_from_its_tokens() {
    one_loss(2, Some(4), "KILL", &["--history-bytes", "0"]).await;
    one_loss(1, None, "KILL", &["--history-bytes", "0"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_in_nobodys_way_and_not_for_ever() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let args = ["--attn-cache-tokens", "256", "--step-deadline", "1", "--prefix-idle", "1"];
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &args);
    let client = client(&model, &bootstrap, Patience::default()).await;
    // Each takes nearly all of the cache, and leaves it full.
    for seed in 0..4 {
        let generation = generate(&client, &prompt(seed, 200), &options(20, Some(""))).await;
        assert_eq!((cached(&generation), generation.output_ids.len()), (0, 20));
        holds_nothing(&client, &nodes[0]).await;
        let info = info(&client, &nodes[0]).await;
        assert_eq!((info.cache_tokens_left, info.cache_tokens_total), (256, 256));
    }
    let deadline = tokio::time::Instant::now() + HANG / 2;
    loop {
        let info = info(&client, &nodes[0]).await;
        if (info.prefix_tokens_kept, info.prefix_bytes) == (0, 0) {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{info:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A session in frames, as another implementation of a client would have it.
struct Raw {
    peer: Stranger,
    hop: Announcement,
    ticket: Ticket,
}

impl Raw {
    async fn open(&mut self, prefix: proto::Prefix, adopt: bool) -> proto::frame::Body {
        self.ticket.session = helion::swarm::ticket::SessionId::random();
        let mut open = self.ticket.sign(self.peer.swarm.identity().keypair()).unwrap();
        (open.prefix, open.adopt_prefix) = (Some(prefix), adopt);
        let header = frame(self.ticket.session, 1, proto::frame::Body::Open(open));
        self.peer.ask(&self.hop, header, vec![]).await
    }

    /// Tokens that a session with these names begins with.
    async fn finds(&mut self, prefix: &proto::Prefix) -> u64 {
        let opened = match self.open(prefix.clone(), true).await {
            proto::frame::Body::Opened(opened) => opened,
            other => panic!("not opened: {other:?}"),
        };
        self.close().await;
        opened.prefix_tokens
    }

    async fn close(&self) {
        let link = self.peer.swarm.link(self.hop.peer_id, &self.hop.addresses).await.unwrap();
        let close = frame(self.ticket.session, 1, proto::frame::Body::Close(proto::Close::default()));
        link.send(Frame::bare(close)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_served_what_another_peer_filled_whatever_names_it_sends() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let join = async || {
        let peer = Stranger::join(&bootstrap).await;
        let ticket = ticket(&client, peer.swarm.peer_id(), hop.peer_id, 0..6);
        let limits = SessionLimits { max_step_tokens: 64, ..ticket.limits };
        Raw { peer, hop: hop.clone(), ticket: Ticket { limits, ..ticket } }
    };
    let (mut one, mut other) = (join().await, join().await);
    let names = proto::Prefix {
        context: vec![1; 32].into(),
        keys: (0..3 * KEY_BYTES as u8).collect::<Vec<_>>().into(),
        length_class: 0,
        page_tokens: PAGE_TOKENS as u32,
    };
    assert!(matches!(one.open(names.clone(), false).await, proto::frame::Body::Opened(_)));
    // 40 rows fill two pages of the three that are named.
    let proto::frame::Body::Step(step) = foreign_step(1, 0) else { panic!("no step") };
    let (lanes, tensor) = (&step.lanes[0], step.tensor.unwrap());
    let step = proto::Step {
        lanes: vec![proto::LaneRun { tokens: 40, ..*lanes }],
        tensor: Some(proto::Tensor { rows: 40, ..tensor }),
        ..step
    };
    let header = frame(one.ticket.session, 1, proto::frame::Body::Step(step));
    let answer = one.peer.ask(&hop, header, vec![0; 40 * 256]).await;
    assert!(matches!(answer, proto::frame::Body::Output(_)), "{answer:?}");
    assert_eq!(one.finds(&names).await, 32, "the session that filled them is still open, or not");
    assert_eq!(other.finds(&names).await, 0, "a stranger that knows the names");
    let with = |change: &dyn Fn(&mut proto::Prefix)| {
        let mut names = names.clone();
        change(&mut names);
        names
    };
    assert_eq!(one.finds(&with(&|names| names.context = vec![2; 32].into())).await, 0);
    assert_eq!(one.finds(&with(&|names| names.length_class = 3)).await, 0);
    assert_eq!(one.finds(&with(&|names| names.page_tokens = 32)).await, 0);
    assert_eq!(
        one.finds(&with(&|names| names.keys = names.keys.slice(KEY_BYTES..))).await,
        16,
        "any page may be first"
    );
    let own = one.ticket.clone();
    for changed in [
        Ticket { wire_dtype: Dtype::Bf16, ..own.clone() },
        Ticket { wire_codec: WireCodec::Q8, ..own.clone() },
        Ticket { blocks: 1..6, ..own.clone() },
    ] {
        one.ticket = changed;
        assert_eq!(one.finds(&names).await, 0);
    }
    one.ticket = Ticket { limits: SessionLimits { max_tokens: 20, ..own.limits }, ..own };
    assert_eq!(one.finds(&names).await, 16, "no more than the session may hold");

    for wrong in [
        with(&|names| names.context = vec![1; 31].into()),
        with(&|names| names.keys = vec![0; KEY_BYTES + 1].into()),
        with(&|names| names.keys = vec![0; (MOST_KEYS + 1) * KEY_BYTES].into()),
    ] {
        let answer = one.open(wrong, true).await;
        let proto::frame::Body::Fault(fault) = answer else { panic!("not refused: {answer:?}") };
        assert_eq!((fault.code(), fault.blame()), (proto::Code::BadTicket, proto::Blame::Client));
    }
    assert_eq!(one.finds(&names).await, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_with_one_identity_share_what_their_prompts_begin_with() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let key = place.path().join("client.key").display().to_string();
    let run = |args: &[&str]| {
        let args = [&["--max-tokens", "5", "--ignore-eos"], args].concat();
        place.generate(&model, &bootstrap, &prompt(4, 200), &args).json()
    };
    let first = run(&["--identity-path", &key]);
    let second = run(&["--identity-path", &key]);
    let stranger = run(&[]);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 192);
    for other in [&first, &stranger] {
        assert_eq!(other["output_ids"], second["output_ids"]);
        assert!(other["usage"].get("prompt_tokens_details").is_none());
    }
}
