//! What a hop checks before it believes a frame: pure functions, so that every refusal can be tested.

use std::collections::HashSet;

use bytes::Bytes;
use libp2p::PeerId;

use crate::{
    engine::{HiddenStates, Keep, LaneRun},
    model::{Dtype, fingerprint::Fingerprint},
    swarm::{
        announcement::{Announcement, unix_ms},
        lanes::BadLaneChanges,
        proto::{announcement, session as proto},
        ticket::{SessionLimits, Ticket},
    },
};

/// Why a hop refuses to open a session or to take a step. The code and the text go to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind of refusal.
    pub code: proto::Code,
    /// What is wrong, with the values, and the way out.
    pub message: String,
    /// The other peer that it is about.
    pub about: Option<PeerId>,
}

impl Refusal {
    pub(crate) fn new(code: proto::Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), about: None }
    }

    /// Also where there is one and the sender has no part in it, so that a stranger learns nothing.
    pub(crate) fn unknown_session() -> Self {
        Self::new(proto::Code::UnknownSession, "no such session with this peer upstream of it")
    }
}

/// What a hop is: the part of its state that a ticket is held against.
#[derive(Debug, Clone)]
pub struct Hosted {
    /// This node.
    pub peer: PeerId,
    /// The swarm it serves.
    pub dht_prefix: String,
    /// The model it serves.
    pub fingerprint: Fingerprint,
    /// The blocks it serves.
    pub span: std::ops::Range<usize>,
}

impl Hosted {
    /// Holds a verified ticket from `sender` against what this node hosts, and the next hop's announcement against the
    /// ticket.
    ///
    /// # Errors
    /// The refusal to send back.
    pub fn check_ticket(&self, ticket: &Ticket, sender: PeerId, next: Option<&Announcement>) -> Result<(), Refusal> {
        use proto::Code;
        if ticket.client != sender {
            return Err(Refusal::new(
                Code::NotAllowed,
                format!("the ticket is {}'s, and the connection is {sender}'s", ticket.client),
            ));
        }
        if ticket.hop != self.peer {
            return Err(Refusal::new(
                Code::BadTicket,
                format!("the ticket is for {}, and this is {}", ticket.hop, self.peer),
            ));
        }
        if ticket.dht_prefix != self.dht_prefix || ticket.fingerprint != self.fingerprint {
            return Err(Refusal::new(
                Code::WrongModel,
                format!(
                    "the ticket is for {} ({}), and this node serves {} ({}): look up the swarm again",
                    ticket.dht_prefix, ticket.fingerprint, self.dht_prefix, self.fingerprint
                ),
            ));
        }
        if ticket.blocks.start < self.span.start || ticket.blocks.end > self.span.end {
            return Err(Refusal::new(
                Code::WrongBlocks,
                format!(
                    "the ticket asks for blocks {}:{}, and this node serves {}:{}",
                    ticket.blocks.start, ticket.blocks.end, self.span.start, self.span.end
                ),
            ));
        }
        let (asked, most) = (&ticket.limits, &SessionLimits::LARGEST);
        for (what, asked, most) in [
            ("lanes", u64::from(asked.max_lanes), u64::from(most.max_lanes)),
            ("tokens", asked.max_tokens, most.max_tokens),
            ("steps in flight", u64::from(asked.max_in_flight), u64::from(most.max_in_flight)),
            ("tokens a step", u64::from(asked.max_step_tokens), u64::from(most.max_step_tokens)),
        ] {
            if asked > most {
                return Err(Refusal::new(Code::TooLarge, format!("{asked} {what} asked for, and {most} is the most")));
            }
        }
        if ticket.take_over_from == Some(self.peer) {
            return Err(Refusal::new(Code::BadTicket, "the ticket says that this node takes over from itself"));
        }
        if ticket.downstream == self.peer {
            return Err(Refusal::new(Code::BadTicket, "the ticket names this node as its own next hop"));
        }
        if ticket.downstream == ticket.client {
            return Ok(());
        }
        match next {
            Some(next) if next.peer_id != ticket.downstream => Err(Refusal::new(
                Code::BadTicket,
                format!("the announcement is {}'s, and the ticket's next hop is {}", next.peer_id, ticket.downstream),
            )),
            Some(next) if next.dht_prefix != self.dht_prefix || Fingerprint(next.fingerprint) != self.fingerprint => {
                Err(Refusal::new(
                    Code::BadTicket,
                    format!("the next hop {} serves another model: {}", next.peer_id, next.dht_prefix),
                ))
            }
            Some(next) if !next.span.contains(&ticket.blocks.end) => Err(Refusal::new(
                Code::BadTicket,
                format!(
                    "the next hop {} serves {}:{}, and block {} is next",
                    next.peer_id, next.span.start, next.span.end, ticket.blocks.end
                ),
            )),
            Some(_) => Ok(()),
            None => Err(Refusal::new(
                Code::BadTicket,
                format!("the next hop's announcement is missing, so {} can't be dialled", ticket.downstream),
            )),
        }
    }
}

impl Hosted {
    /// Reads whom a session of `blocks` is to be handed over to: a peer that serves them, of the same model.
    ///
    /// # Errors
    /// The refusal to send back.
    pub fn check_receiver(
        &self,
        order: &proto::HandOver,
        blocks: &std::ops::Range<usize>,
    ) -> Result<Announcement, Refusal> {
        let bad = |message: String| Refusal::new(proto::Code::BadTicket, message);
        let to =
            order.to.as_ref().ok_or_else(|| bad("no announcement says who is to take the session over".to_owned()))?;
        let to = Announcement::of_an_address(to, unix_ms())
            .map_err(|error| bad(format!("the announcement of the peer that is to take the session over: {error}")))?;
        let is_alike = to.dht_prefix == self.dht_prefix && Fingerprint(to.fingerprint) == self.fingerprint;
        let has_blocks = to.span.start <= blocks.start && blocks.end <= to.span.end;
        if to.peer_id == self.peer || !is_alike || !has_blocks {
            return Err(bad(format!(
                "{} serves {}:{} of {}, and blocks {}:{} of {} are to be handed over",
                to.peer_id, to.span.start, to.span.end, to.dht_prefix, blocks.start, blocks.end, self.dht_prefix
            )));
        }
        Ok(to)
    }
}

/// Times of hops that a step may have passed: more than any route has. A header that was full of them could not be passed on, and who
/// gets no answer would be taken for gone.
pub const MOST_TIMES: usize = 1024;

fn check_times(step: &proto::Step) -> Result<(), Refusal> {
    let times = step.times.len();
    if times > MOST_TIMES {
        return Err(Refusal::new(proto::Code::WrongStep, format!("the times of {times} hops, {MOST_TIMES} at most")));
    }
    Ok(())
}

/// A step that passed the border.
#[derive(Debug)]
pub struct CheckedStep {
    /// What of the payload belongs to which lane.
    pub lanes: Vec<LaneRun>,
    /// The payload.
    pub hidden: HiddenStates,
    /// What the last hop answers.
    pub keep: Keep,
    /// The length that length-dependent RoPE factors are taken for.
    pub rope_length: Option<usize>,
}

/// Checks a step's shape against its ticket and the model's `hidden` size. Positions are checked where the KV cache is.
///
/// # Errors
/// The refusal to send back.
pub fn check_step(ticket: &Ticket, hidden: usize, step: &proto::Step, payload: Bytes) -> Result<CheckedStep, Refusal> {
    use proto::Code;
    let bad = |message: String| Refusal::new(Code::BadTensor, message);
    check_times(step)?;
    let tensor = step.tensor.as_ref().ok_or_else(|| bad("the step describes no tensor".to_owned()))?;
    let dtype: Dtype = tensor.dtype().try_into().map_err(|e| bad(format!("{e}")))?;
    if dtype != ticket.wire_dtype {
        return Err(bad(format!("hidden states in {dtype}, and the ticket says {}", ticket.wire_dtype)));
    }
    if tensor.hidden as usize != hidden {
        return Err(bad(format!("hidden size {}, and the model's is {hidden}", tensor.hidden)));
    }
    if tensor.rows == 0 || tensor.rows > ticket.limits.max_step_tokens {
        return Err(bad(format!("{} rows, and the ticket allows 1 to {}", tensor.rows, ticket.limits.max_step_tokens)));
    }
    if announcement::WireCodec::from(ticket.wire_codec) as i32 != tensor.codec {
        return Err(bad(format!(
            "hidden states packed as codec {}, and the ticket says {}",
            tensor.codec, ticket.wire_codec
        )));
    }
    let shape = (tensor.rows as usize, hidden);
    let bytes = ticket.wire_codec.decode(dtype, shape, payload).map_err(|error| bad(error.to_string()))?;
    let mut seen = HashSet::new();
    let mut rows = 0u64;
    for run in &step.lanes {
        if run.lane >= ticket.limits.max_lanes {
            return Err(bad(format!("lane {}, and the ticket allows {}", run.lane, ticket.limits.max_lanes)));
        }
        if run.tokens == 0 || !seen.insert(run.lane) {
            return Err(bad(format!("lane {} is empty, or named twice", run.lane)));
        }
        let end = run.position.saturating_add(u64::from(run.tokens));
        if end > ticket.limits.max_tokens {
            return Err(Refusal::new(
                Code::TooLarge,
                format!(
                    "lane {} would grow to {end} tokens, and the ticket allows {}",
                    run.lane, ticket.limits.max_tokens
                ),
            ));
        }
        rows += u64::from(run.tokens);
    }
    if rows != u64::from(tensor.rows) {
        return Err(bad(format!("{} rows, and the lanes name {rows}", tensor.rows)));
    }
    let keep = match step.want() {
        proto::Want::Last => Keep::LastOfEachLane,
        proto::Want::All => Keep::All,
        proto::Want::None => Keep::Nothing,
        proto::Want::Unspecified => {
            return Err(Refusal::new(
                Code::Unsupported,
                format!("the step wants {}, which is unknown here", step.want),
            ));
        }
    };
    Ok(CheckedStep {
        lanes: step
            .lanes
            .iter()
            .map(|run| LaneRun { lane: run.lane, position: run.position as usize, tokens: run.tokens as usize })
            .collect(),
        hidden: HiddenStates { dtype, rows: rows as usize, hidden, bytes },
        keep,
        rope_length: (step.rope_length > 0).then_some(step.rope_length as usize),
    })
}

/// Checks that a step that changes lanes does nothing else. The lanes are checked where the KV cache is.
///
/// # Errors
/// The refusal to send back.
pub fn check_lane_changes(step: &proto::Step, payload: &Bytes) -> Result<(), Refusal> {
    check_times(step)?;
    if step.tensor.is_some() || !step.lanes.is_empty() || !payload.is_empty() {
        return Err(BadLaneChanges::WithRows.into());
    }
    if step.want() != proto::Want::None {
        let message = format!("the step wants {}, and one that copies or drops lanes has no rows to answer", step.want);
        return Err(Refusal::new(proto::Code::WrongStep, message));
    }
    Ok(())
}

impl From<BadLaneChanges> for Refusal {
    fn from(error: BadLaneChanges) -> Self {
        let code = match error {
            BadLaneChanges::TooManyTokens { .. } => proto::Code::TooLarge,
            _ => proto::Code::WrongStep,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
pub(in crate::node) mod tests {
    use libp2p::identity::Keypair;

    use super::*;
    use crate::swarm::{WireCodec, ticket::SessionId};

    fn peer() -> PeerId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    pub(in crate::node) fn hosted_and_ticket() -> (Hosted, Ticket) {
        let hosted =
            Hosted { peer: peer(), dht_prefix: "tiny".to_owned(), fingerprint: Fingerprint([1; 32]), span: 2..6 };
        let client = peer();
        let ticket = Ticket {
            session: SessionId::random(),
            epoch: 1,
            client,
            hop: hosted.peer,
            upstream: client,
            downstream: client,
            dht_prefix: "tiny".to_owned(),
            fingerprint: Fingerprint([1; 32]),
            blocks: 2..6,
            wire_dtype: Dtype::Bf16,
            wire_codec: WireCodec::Raw,
            limits: SessionLimits { max_lanes: 2, max_tokens: 10, max_in_flight: 2, max_step_tokens: 4 },
            take_over_from: None,
            expires_unix_ms: 0,
        };
        (hosted, ticket)
    }

    #[test]
    fn tickets_for_something_else_are_refused() {
        let (hosted, good) = hosted_and_ticket();
        assert_eq!(hosted.check_ticket(&good, good.client, None), Ok(()));
        assert_eq!(hosted.check_ticket(&good, peer(), None).unwrap_err().code, proto::Code::NotAllowed);
        type Change = Box<dyn Fn(&mut Ticket)>;
        let cases: [(proto::Code, Change); 8] = [
            (proto::Code::BadTicket, Box::new(|t| t.take_over_from = Some(t.hop))),
            (proto::Code::BadTicket, Box::new(|t| t.hop = t.client)),
            (proto::Code::WrongModel, Box::new(|t| t.dht_prefix = "other".to_owned())),
            (proto::Code::WrongModel, Box::new(|t| t.fingerprint = Fingerprint([2; 32]))),
            (proto::Code::WrongBlocks, Box::new(|t| t.blocks = 1..6)),
            (proto::Code::WrongBlocks, Box::new(|t| t.blocks = 2..7)),
            (proto::Code::TooLarge, Box::new(|t| t.limits.max_in_flight = 1000)),
            (proto::Code::BadTicket, Box::new(|t| t.downstream = t.hop)),
        ];
        for (code, change) in cases {
            let mut ticket = good.clone();
            change(&mut ticket);
            assert_eq!(hosted.check_ticket(&ticket, good.client, None).unwrap_err().code, code);
        }
        let mut chained = good.clone();
        chained.downstream = peer();
        let refusal = hosted.check_ticket(&chained, good.client, None).unwrap_err();
        assert!(refusal.message.contains("announcement is missing"), "{refusal}");

        // The next hop must serve the block that comes next, of the same model.
        let next = Announcement {
            dht_prefix: "tiny".to_owned(),
            fingerprint: [1; 32],
            model_blocks: 9,
            span: 6..9,
            ..Announcement::blank(chained.downstream)
        };
        assert_eq!(hosted.check_ticket(&chained, good.client, Some(&next)), Ok(()));
        for wrong in [
            Announcement { span: 7..9, ..next.clone() },
            Announcement { fingerprint: [2; 32], ..next.clone() },
            Announcement { dht_prefix: "other".to_owned(), ..next.clone() },
            Announcement { peer_id: peer(), ..next.clone() },
        ] {
            let refusal = hosted.check_ticket(&chained, good.client, Some(&wrong)).unwrap_err();
            assert_eq!(refusal.code, proto::Code::BadTicket, "{refusal}");
        }
    }

    fn step(rows: u32, lanes: &[(u32, u64, u32)]) -> proto::Step {
        proto::Step {
            number: 1,
            lanes: lanes.iter().map(|&(lane, position, tokens)| proto::LaneRun { lane, position, tokens }).collect(),
            tensor: Some(proto::Tensor {
                dtype: crate::swarm::proto::announcement::Dtype::Bf16.into(),
                rows,
                hidden: 4,
                ..Default::default()
            }),
            want: proto::Want::Last.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_step_of_the_right_shape_passes() {
        let (_, ticket) = hosted_and_ticket();
        let checked = check_step(&ticket, 4, &step(3, &[(0, 5, 2), (1, 0, 1)]), vec![0; 24].into()).unwrap();
        assert_eq!((checked.hidden.rows, checked.lanes.len()), (3, 2));
    }

    #[test]
    fn steps_of_a_wrong_shape_are_refused_and_say_why() {
        let (_, ticket) = hosted_and_ticket();
        let two = step(2, &[(0, 0, 2)]);
        let with = |change: &dyn Fn(&mut proto::Step)| {
            let mut step = two.clone();
            change(&mut step);
            step
        };
        let tensor = |step: &mut proto::Step, change: &dyn Fn(&mut proto::Tensor)| {
            change(step.tensor.as_mut().unwrap());
        };
        for (step, payload, says) in [
            (with(&|s| s.tensor = None), 16, "no tensor"),
            (with(&|s| tensor(s, &|t| t.dtype = 1)), 32, "hidden states in f32"),
            (with(&|s| tensor(s, &|t| t.dtype = 77)), 16, "doesn't know"),
            (with(&|s| tensor(s, &|t| t.hidden = 5)), 20, "hidden size 5"),
            (with(&|s| tensor(s, &|t| t.codec = 1)), 16, "packed as codec 1"),
            (with(&|s| tensor(s, &|t| t.rows = 0)), 0, "0 rows"),
            (with(&|s| tensor(s, &|t| t.rows = u32::MAX)), 16, "rows, and the ticket"),
            (two.clone(), 15, "15 bytes"),
            (step(2, &[(0, 0, 1)]), 16, "the lanes name 1"),
            (step(2, &[(0, 0, 1), (0, 1, 1)]), 16, "named twice"),
            (step(2, &[(2, 0, 2)]), 16, "lane 2"),
            (step(2, &[(0, 9, 2)]), 16, "grow to 11"),
            (step(2, &[(0, u64::MAX, 2)]), 16, "grow to"),
            (with(&|s| s.want = 9), 16, "wants 9"),
            (with(&|s| s.times = vec![proto::HopTime::default(); MOST_TIMES + 1]), 16, "times of 1025"),
        ] {
            let refusal = check_step(&ticket, 4, &step, vec![0; payload].into()).unwrap_err();
            assert!(refusal.message.contains(says), "{refusal} should say {says}");
        }
    }

    #[test]
    fn a_step_that_changes_lanes_does_nothing_else() {
        let bare = proto::Step { want: proto::Want::None.into(), drops: vec![1], ..Default::default() };
        assert_eq!(check_lane_changes(&bare, &Bytes::new()), Ok(()));
        let rows = step(1, &[(0, 0, 1)]);
        for (step, payload, says) in [
            (proto::Step { tensor: rows.tensor, ..bare.clone() }, 0, "send two steps"),
            (proto::Step { lanes: rows.lanes, ..bare.clone() }, 0, "send two steps"),
            (bare.clone(), 1, "send two steps"),
            (proto::Step { want: proto::Want::Last.into(), ..bare.clone() }, 0, "wants 1"),
            (proto::Step { want: 9, ..bare.clone() }, 0, "wants 9"),
            (proto::Step { times: vec![Default::default(); MOST_TIMES + 1], ..bare.clone() }, 0, "times of 1025"),
        ] {
            let refusal = check_lane_changes(&step, &vec![0; payload].into()).unwrap_err();
            assert_eq!(refusal.code, proto::Code::WrongStep);
            assert!(refusal.message.contains(says), "{refusal} should say {says}");
        }
        let too_many = Refusal::from(BadLaneChanges::TooManyTokens { tokens: 13, most: 12 });
        assert_eq!(too_many.code, proto::Code::TooLarge);
    }
}
