//! Tests of what peers count as: their load, their room, and what the user wants of a route.

use super::*;
use crate::{
    client::{
        speeds::{HopStep, Load},
        view::tests::identity,
    },
    swarm::announcement::State,
};

const MS: Duration = Duration::from_millis(1);

/// A view of peers that serve all of 8 blocks, one after the other: their round trips in ms, and free tokens.
fn view(peers: &[(u32, u64)]) -> SwarmView {
    let mut view = SwarmView::new(identity(&[]), 8);
    for &(rtt_ms, cache_tokens_left) in peers {
        let announcement = Announcement {
            span: 0..8,
            fingerprint: [7; 32],
            state: State::Online,
            compute_tokens_per_second: 1000.0,
            cache_tokens_left,
            cache_tokens_total: 100_000,
            ..Announcement::blank(PeerId::random())
        };
        view.peers.push(PeerView { announcement, rtt: Some(rtt_ms * MS), speeds: Default::default() });
    }
    view
}

fn chooser(view: &SwarmView, work: Work, room: u64) -> Chooser<'_> {
    Chooser { view, work, row_bytes: 2048, room, legs: HashMap::new() }
}

/// Which peer of the view runs all blocks.
fn chosen(view: &SwarmView, work: Work, room: u64) -> usize {
    let hops = chooser(view, work, room).fastest(0..8, |_| true).unwrap();
    view.peers.iter().position(|peer| peer.announcement.peer_id == hops[0].announcement.peer_id).unwrap()
}

#[test]
fn among_equals_the_one_with_more_room() {
    assert_eq!(chosen(&view(&[(10, 2_000), (10, 50_000)]), Work::DECODE, 1_000), 1);
    // A little nearer is not worth a crowd, and much nearer is.
    assert_eq!(chosen(&view(&[(9, 1_100), (10, 50_000)]), Work::DECODE, 1_000), 1);
    assert_eq!(chosen(&view(&[(9, 1_100), (90, 50_000)]), Work::DECODE, 1_000), 0);
    assert_eq!(chosen(&view(&[(9, 900), (90, 50_000)]), Work::DECODE, 1_000), 1, "no room at all");
}

/// A chat may fill the model's context: that is no reason to take all peers for full.
#[test]
fn a_large_context_does_not_make_every_peer_full() {
    let limits = SessionLimits { max_lanes: 1, max_tokens: 131_072, max_in_flight: 4, max_step_tokens: 128 };
    let room = room_soon(300, &limits);
    assert!((300..2_000).contains(&room), "{room}");
    assert_eq!(chosen(&view(&[(10, 16_000), (100, 90_000)]), Work::DECODE, room), 0);
    assert_eq!(room_soon(70, &SessionLimits { max_tokens: 100, ..limits }), 100);
    assert!(room_soon(300, &SessionLimits { max_lanes: 8, ..limits }) > 3_000);
}

#[test]
fn what_a_peer_says_of_its_queue_counts_until_it_is_old() {
    let mut view = view(&[(10, 50_000), (20, 50_000)]);
    let load = Load { cache_tokens_left: 50_000, queue: 50 };
    view.peers[0].speeds.learn_load(load, Instant::now());
    assert_eq!(chosen(&view, Work::DECODE, 100), 1);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    view.peers[0].speeds.learn_load(load, long_ago);
    assert_eq!(chosen(&view, Work::DECODE, 100), 0);
}

/// It was crowded for a moment; the client went elsewhere and comes back.
#[test]
fn a_client_comes_back_to_a_peer_that_was_crowded() {
    let mut view = view(&[(10, 50_000), (40, 50_000)]);
    let burst = HopStep { rows: 1, blocks: 8, queued: 1000 * MS, computed: 8 * MS };
    let seen = |ago: u64| Instant::now().checked_sub(Duration::from_secs(ago)).unwrap();
    view.peers[0].speeds.learn_step(burst, seen(0));
    assert_eq!(chosen(&view, Work::DECODE, 100), 1);
    view.peers[0].speeds = Default::default();
    view.peers[0].speeds.learn_step(burst, seen(90));
    assert_eq!(chosen(&view, Work::DECODE, 100), 0);
}

#[test]
fn the_route_mode_changes_the_choice() {
    let mut view = view(&[(10, 50_000), (60, 50_000)]);
    let now = Instant::now();
    // The near one's link is narrow.
    view.peers[0].speeds.learn_echo(50_000, 2000 * MS, now);
    view.peers[1].speeds.learn_echo(50_000, MS, now);
    let through = |work: Work, mode| chosen(&view, work.seen_as(mode), 100);
    let long = Work { prompt: 4096, chunk: 128, tokens: 1 };
    for (mode, of_a_token, of_a_prompt) in
        [(RouteMode::Auto, 0, 1), (RouteMode::Latency, 0, 0), (RouteMode::Throughput, 1, 1)]
    {
        assert_eq!((through(Work::DECODE, mode), through(long, mode)), (of_a_token, of_a_prompt), "{mode}");
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    assert!("fast".parse::<RouteMode>().is_err());
}

#[test]
fn legs_between_hops_are_what_the_step_does_not_explain() {
    let rtts = [Some(20 * MS), Some(60 * MS)];
    let between = between_hops_seconds(100 * MS, 30 * MS, &rtts).unwrap();
    assert!((between - (0.1 - 0.03 - 0.04 - 2.0 * HOP_SECONDS)).abs() < 1e-9, "{between}");
    assert_eq!(between_hops_seconds(50 * MS, 30 * MS, &rtts), Some(0.0));
    assert_eq!(between_hops_seconds(50 * MS, 30 * MS, &[None, Some(MS)]), None);
}
