use proptest::prelude::*;

use super::*;

/// Steps of one owner that came long ago.
fn demands(rows: &[usize]) -> Vec<Demand> {
    let arrived = Instant::now();
    let demand = |rows: &usize| Demand { rows: *rows, owner: owner(0), is_short: *rows <= 8, arrived };
    rows.iter().map(demand).collect()
}

fn owner(number: u64) -> Owner {
    Owner::of(&number)
}

fn shares(rows: &[usize], budget: usize) -> Vec<(usize, usize)> {
    pairs(&Schedule::new(budget).divide(&demands(rows), false))
}

fn pairs(shares: &[Share]) -> Vec<(usize, usize)> {
    shares.iter().map(|share| (share.step, share.rows)).collect()
}

#[test]
fn decode_steps_all_fit_and_a_prompt_gets_the_first_small_chunk() {
    assert_eq!(shares(&[1, 4096, 1, 1], 512), [(0, 1), (1, 16), (2, 1), (3, 1)]);
}

#[test]
fn prompts_alone_get_all_and_are_served_in_order() {
    assert_eq!(shares(&[300, 300, 300], 512), [(0, 300), (1, 212)]);
    let chunk = Schedule::new(512).divide(&demands(&[300]), true);
    assert_eq!(pairs(&chunk), [(0, 16)], "somebody is about to decode");
}

#[test]
fn many_short_steps_leave_half_to_a_prompt() {
    let mut rows = vec![1; 1000];
    rows.push(4096);
    let shares = shares(&rows, 64);
    assert_eq!(shares.last(), Some(&(1000, 16)));
    assert_eq!(shares.len(), 33);
}

#[test]
fn nothing_waits_for_nothing() {
    assert!(shares(&[], 512).is_empty());
    assert_eq!(shares(&[9], 0), [(0, 2)]);
}

#[test]
fn a_step_that_waited_for_a_chunk_goes_without_one() {
    let mut schedule = Schedule::new(512);
    let mut demands = demands(&[300, 1]);
    let began = demands[0].arrived;
    let at = |ms: u64| began + Duration::from_millis(ms);
    schedule.ran(PassRows { short: 0, long: 100 }, Duration::from_millis(10), at(10));
    // It came after the chunk: the next one is no worse than the one that it might have met.
    demands[1].arrived = at(11);
    assert_eq!(schedule.divide(&demands, false).len(), 2);
    demands[1].arrived = at(9);
    assert_eq!(pairs(&schedule.divide(&demands, false)), [(1, 1)]);
    schedule.ran(PassRows { short: 1, long: 0 }, Duration::from_millis(1), at(12));
    // Now the prompt has its turn, whoever waited.
    assert_eq!(schedule.divide(&demands, false).len(), 2);
}

#[test]
fn a_step_that_waited_for_company_goes_without_a_chunk() {
    let mut schedule = Schedule::new(512);
    let mut demands = demands(&[300, 1]);
    let began = demands[1].arrived;
    // The prompt came, and ended the wait.
    demands[0].arrived = began + Duration::from_millis(50);
    schedule.waited(began + Duration::from_millis(50));
    assert_eq!(pairs(&schedule.divide(&demands, false)), [(1, 1)]);
    schedule.ran(PassRows { short: 1, long: 0 }, Duration::from_millis(1), began + Duration::from_millis(51));
    assert_eq!(schedule.divide(&demands, false).len(), 2);
    // As long as a chunk takes, and never longer.
    assert_eq!(schedule.longest_wait(), Duration::from_millis(100));
    schedule.ran(PassRows { short: 1, long: 0 }, Duration::from_millis(399), began + Duration::from_secs(1));
    assert_eq!(schedule.longest_wait(), Duration::from_millis(400));
}

#[test]
fn twenty_sessions_of_one_owner_get_no_more_than_one_of_another() {
    let mut schedule = Schedule::new(64);
    let mut all = demands(&[4000; 21]);
    all[20].owner = owner(1);
    let mut had = [0, 0];
    for _ in 0..10 {
        for share in schedule.divide(&all, false) {
            all[share.step].rows -= share.rows;
            had[usize::from(share.step == 20)] += share.rows;
        }
    }
    assert_eq!(had, [320, 320]);
    assert_eq!(all[0].rows, 4000 - 320, "of one owner the oldest comes first");
}

#[test]
fn decoding_counts_and_nobody_saves_up() {
    let mut schedule = Schedule::new(64);
    let mut all = demands(&[4000, 4000]);
    all[1].owner = owner(1);
    all.extend(demands(&[1; 8]));
    let rows = |shares: &[Share], step: usize| shares.iter().find(|s| s.step == step).map_or(0, |share| share.rows);
    schedule.ran(PassRows { short: 0, long: 100 }, Duration::from_millis(10), all[0].arrived);
    // The first owner's tokens are a part of what it gets.
    let shares = [schedule.divide(&all, false), schedule.divide(&all, false)];
    let had = [0, 1].map(|step| shares.iter().map(|shares| rows(shares, step)).sum::<usize>());
    assert_eq!((had[0] + had[1], had[1] > had[0]), (2 * 56, true), "{had:?}");
    // One that wanted nothing for a while, or only a token, gets no more than its part then.
    let mut late = demands(&[1, 4000]);
    late[0].owner = owner(2);
    (0..50).for_each(|_| drop(schedule.divide(&late, false)));
    late[0] = Demand { rows: 4000, is_short: false, ..late[0] };
    let shares = schedule.divide(&late, false);
    assert_eq!((rows(&shares, 0), rows(&shares, 1)), (32, 32));
}

proptest! {
    #[test]
    fn the_budget_is_used_up_and_kept(
        left in prop::collection::vec((9..900usize, 0..4u64), 1..40), budget in 2..600usize,
    ) {
        let mut all = demands(&left.iter().map(|(rows, _)| *rows).collect::<Vec<_>>());
        all.iter_mut().zip(&left).for_each(|(demand, (_, number))| demand.owner = owner(*number));
        let shares = Schedule::new(budget).divide(&all, false);
        let total: usize = shares.iter().map(|share| share.rows).sum();
        prop_assert_eq!(total, budget.min(all.iter().map(|demand| demand.rows).sum()));
        prop_assert!(shares.iter().all(|share| share.rows > 0 && share.rows <= all[share.step].rows));
        prop_assert!(shares.windows(2).all(|pair| pair[0].step < pair[1].step));
    }

    #[test]
    fn the_oldest_short_and_the_oldest_long_step_always_move(
        left in prop::collection::vec(1..900usize, 1..40), budget in 16..600usize,
    ) {
        let shares = Schedule::new(budget).divide(&demands(&left), false);
        for is_short in [true, false] {
            if let Some(oldest) = left.iter().position(|rows| (*rows <= 8) == is_short) {
                prop_assert!(shares.iter().any(|share| share.step == oldest));
            }
        }
    }
}

/// A session in the simulation: decodes tokens, or sends a prompt, and thinks before the next step.
#[derive(Debug, Clone)]
struct Session {
    owner: u64,
    /// Of its steps, in turn.
    rows: Vec<usize>,
    /// Before each.
    pause_us: u64,
}

/// A step that is ready or on its way.
struct Running {
    session: usize,
    demand: Demand,
    /// Passes with rows of prompts, and others, since it arrived.
    seen: PassRows,
}

fn session() -> impl Strategy<Value = Session> {
    let rows = prop_oneof![
        prop::collection::vec(1..3usize, 5..40),
        prop::collection::vec(9..700usize, 1..4),
        prop::collection::vec(prop_oneof![4 => Just(1usize), 1 => 9..700usize], 5..30),
    ];
    (0..3u64, rows, 0..200_000u64).prop_map(|(owner, rows, pause_us)| Session { owner, rows, pause_us })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// The rule of the module's docs, on machines of any speed: a short step sees two passes at most, and one chunk.
    #[test]
    fn the_decode_gap_is_two_steps_and_a_chunk(
        sessions in prop::collection::vec(session(), 1..12), base_us in 0..100_000u64, row_us in 1..20_000u64,
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut schedule = Schedule::new(256);
        let step = |session: usize, index: usize, now: Instant| sessions[session].rows.get(index).map(|&rows| Running {
            session,
            demand: Demand {
                rows,
                owner: owner(sessions[session].owner),
                is_short: rows <= 8,
                arrived: now + Duration::from_micros(sessions[session].pause_us),
            },
            seen: PassRows::default(),
        });
        let mut done = vec![0; sessions.len()];
        let mut all: Vec<Running> = (0..sessions.len()).filter_map(|session| step(session, 0, now)).collect();
        while let Some(next) = all.iter().map(|running| running.demand.arrived).min() {
            now = now.max(next);
            let ready: Vec<usize> = (0..all.len()).filter(|index| all[*index].demand.arrived <= now).collect();
            let demands: Vec<Demand> = ready.iter().map(|index| all[*index].demand).collect();
            let shares = schedule.divide(&demands, all.len() > ready.len());
            prop_assert!(!shares.is_empty());
            let rows = PassRows::of(shares.iter().map(|share| (demands[share.step].is_short, share.rows)));
            let took = Duration::from_micros(base_us + row_us * rows.all() as u64);
            let (began, ended) = (now, now + took);
            schedule.ran(rows, took, ended);
            for share in &shares {
                all[ready[share.step]].demand.rows -= share.rows;
            }
            now = ended;
            if rows.short > 0 && rows.long > 0 {
                // Every session may decode two tokens; the fewest rows of a chunk may take longer than they should.
                let pass = |rows: u64| Duration::from_micros(base_us + row_us * rows);
                let most = Duration::from_millis(100).max(2 * pass(24)).max(pass(24 + MIN_CHUNK as u64));
                prop_assert!(took <= 2 * most, "{took:?} of {most:?}");
            }
            for running in all.iter_mut().filter(|running| running.demand.arrived < ended) {
                // What arrives while a pass runs waits for its end.
                *(if rows.long > 0 { &mut running.seen.long } else { &mut running.seen.short }) += 1;
                let seen = running.seen;
                if running.demand.is_short {
                    prop_assert!(seen.all() <= 2 && seen.long <= 1, "{seen:?}");
                } else if running.demand.arrived <= began {
                    prop_assert!(seen.short <= seen.long + 2, "a prompt starves: {seen:?}");
                }
            }
            let (over, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|running| running.demand.rows == 0);
            all = rest;
            for running in over {
                done[running.session] += 1;
                all.extend(step(running.session, done[running.session], now));
            }
        }
        prop_assert!(done.iter().zip(&sessions).all(|(done, session)| *done == session.rows.len()));
    }
}
