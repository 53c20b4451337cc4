//! Counts the memory of volumes, and decides whether more fits, without any input or output.

use std::{collections::BTreeMap, fmt};

const MIB: u64 = 1 << 20;

/// The bounds of the driver's own memory, which is an eighth of the limit.
const LEAST_FOR_ITSELF: u64 = 20 * MIB;
const MOST_FOR_ITSELF: u64 = 64 * MIB;

/// The number of copies of an answer that exist for a moment: as it was received, and decoded.
const COPIES_OF_AN_ANSWER: u64 = 2;

/// The memory limit of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The limit, in bytes.
    pub bytes: u64,
    /// The source of the limit.
    pub source: Source,
}

/// The source of a memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The process's cgroup, or one above it, has a limit.
    Cgroup,
    /// No cgroup has a limit: it is half of the machine's memory, as for a tmpfs by default.
    Machine,
}

/// The division of a memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    limit: Limit,
    answers: u64,
    own: u64,
}

impl Budget {
    /// Divides a limit. `answer_bytes` is the memory that all answers of a provider may take together;
    /// they get at most a third of the limit.
    pub fn of(limit: Limit, answer_bytes: u64) -> Self {
        Self {
            limit,
            answers: answer_bytes
                .saturating_mul(COPIES_OF_AN_ANSWER)
                .min(limit.bytes / 3),
            own: (limit.bytes / 8).clamp(LEAST_FOR_ITSELF, MOST_FOR_ITSELF),
        }
    }

    /// Returns the limit.
    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// Returns the bytes that all answers of a provider may have together.
    pub fn answer_bytes(&self) -> u64 {
        self.answers / COPIES_OF_AN_ANSWER
    }

    /// Returns the bytes that are kept for the driver itself and for answers of providers.
    pub fn reserve(&self) -> u64 {
        self.own + self.answers
    }

    /// Returns the bytes that the content of all volumes may take.
    pub fn room(&self) -> u64 {
        self.limit.bytes.saturating_sub(self.reserve())
    }

    /// Returns the bytes that one volume may take, so that none uses up the room.
    pub fn of_one_volume(&self) -> u64 {
        self.room() / 2
    }

    /// Returns the bytes that the volumes of one namespace may take together.
    pub fn of_one_namespace(&self) -> u64 {
        self.room() / 4 * 3
    }
}

/// The error of content that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoRoom {
    needed: u64,
    in_use: u64,
    bound: Bound,
    budget: Budget,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Bound {
    Node,
    Namespace(String),
    Volume,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            needed,
            in_use,
            bound,
            budget,
        } = self;
        write!(f, "this content needs {}", Mib(*needed))?;
        match bound {
            Bound::Node => write!(
                f,
                ", and {} of the {} for all volumes of this node are in use",
                Mib(*in_use),
                Mib(budget.room())
            )?,
            Bound::Namespace(namespace) => write!(
                f,
                ", and the volumes of namespace {namespace} hold {} of the {} that one namespace may hold on this node",
                Mib(*in_use),
                Mib(budget.of_one_namespace())
            )?,
            Bound::Volume => write!(
                f,
                ", and one volume may hold {} on this node",
                Mib(budget.of_one_volume())
            )?,
        }
        match budget.limit.source {
            Source::Cgroup => write!(
                f,
                ". What is mounted counts against the driver's memory limit of {}, of which {} are kept for the driver itself and for answers of providers: raise the chart's value linux.driver.resources.limits.memory (linux.driver.builtinResources.limits.memory with sidecars: builtin), or mount less on this node",
                Mib(budget.limit.bytes),
                Mib(budget.reserve())
            ),
            Source::Machine => write!(
                f,
                ". The driver has no memory limit, and may use {}, half of this machine's memory: mount less on this node, or give the driver a memory limit above that",
                Mib(budget.limit.bytes)
            ),
        }
    }
}

impl std::error::Error for NoRoom {}

/// A number of bytes that is displayed in MiB.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = self.0.saturating_mul(10).div_ceil(MIB);
        write!(f, "{}.{} MiB", tenths / 10, tenths % 10)
    }
}

/// The memory of one volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Usage {
    namespace: String,
    used: u64,
    reserved: u64,
    /// Whether the driver wrote the content, so that it is charged to the driver.
    charged: bool,
}

/// The memory of all volumes, by a key of each.
#[derive(Debug)]
pub(super) struct Ledger<K> {
    budget: Budget,
    volumes: BTreeMap<K, Usage>,
}

impl<K: Ord + Clone> Ledger<K> {
    /// Creates a ledger without volumes.
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            volumes: BTreeMap::new(),
        }
    }

    /// Returns how the limit is divided.
    pub(super) fn budget(&self) -> Budget {
        self.budget
    }

    /// Sets a changed limit. Volumes keep what they have, even if it exceeds the new limit.
    pub(super) fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// Reserves memory for content that is about to be written beside a volume's present content.
    ///
    /// # Errors
    /// Says which bound the content exceeds. Nothing is reserved then.
    pub(super) fn reserve(&mut self, key: &K, namespace: &str, bytes: u64) -> Result<(), NoRoom> {
        let refuse = |bound, in_use| {
            Err(NoRoom {
                needed: bytes,
                in_use,
                bound,
                budget: self.budget,
            })
        };
        if bytes > self.budget.of_one_volume() {
            return refuse(Bound::Volume, 0);
        }
        let in_use = self.in_use();
        if in_use.saturating_add(bytes) > self.budget.room() {
            return refuse(Bound::Node, in_use);
        }
        // The volume's present content is not counted, because the new content replaces it.
        let others = self
            .volumes
            .iter()
            .filter(|(other, held)| *other != key && held.charged && held.namespace == namespace);
        let of_namespace: u64 = others.map(|(_, held)| held.used + held.reserved).sum();
        if of_namespace.saturating_add(bytes) > self.budget.of_one_namespace() {
            return refuse(Bound::Namespace(namespace.to_owned()), of_namespace);
        }
        let held = self.volumes.entry(key.clone()).or_default();
        namespace.clone_into(&mut held.namespace);
        held.charged = true;
        held.reserved += bytes;
        Ok(())
    }

    /// Ends a reservation, whether its content was written or not.
    pub(super) fn release(&mut self, key: &K, bytes: u64) {
        if let Some(held) = self.volumes.get_mut(key) {
            held.reserved = held.reserved.saturating_sub(bytes);
            if held.used == 0 && held.reserved == 0 {
                self.volumes.remove(key);
            }
        }
    }

    /// Sets the memory that a volume takes. A volume that takes none is forgotten.
    pub(super) fn holds(&mut self, key: &K, namespace: &str, used: u64, charged: bool) {
        let held = self.volumes.entry(key.clone()).or_default();
        namespace.clone_into(&mut held.namespace);
        held.charged = charged;
        held.used = used;
        if held.used == 0 && held.reserved == 0 {
            self.volumes.remove(key);
        }
    }

    /// Returns whether a volume is known.
    pub(super) fn knows(&self, key: &K) -> bool {
        self.volumes.contains_key(key)
    }

    /// Sets the memory that a volume takes, if the volume is known.
    pub(super) fn changed(&mut self, key: &K, used: u64) {
        if let Some(held) = self.volumes.get_mut(key) {
            held.used = used;
            if held.used == 0 && held.reserved == 0 {
                self.volumes.remove(key);
            }
        }
    }

    /// Measures all volumes, except for those into which content is being written.
    pub(super) fn measure(&mut self, used: impl Fn(&K) -> u64) {
        self.volumes.retain(|key, held| {
            if held.reserved == 0 {
                held.used = used(key);
            }
            held.used + held.reserved > 0
        });
    }

    /// Returns the bytes that are used or reserved and charged to the driver.
    pub(super) fn in_use(&self) -> u64 {
        let charged = self.volumes.values().filter(|held| held.charged);
        charged.map(|held| held.used + held.reserved).sum()
    }

    /// Returns the bytes that all volumes take, including files that providers wrote.
    pub(super) fn mounted(&self) -> u64 {
        self.volumes.values().map(|held| held.used).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    fn budget(mib: u64) -> Budget {
        let limit = Limit {
            bytes: mib * MIB,
            source: Source::Cgroup,
        };
        Budget::of(limit, 64 * MIB)
    }

    #[rstest]
    #[case::of_the_chart(200, 25, 66, 108)]
    #[case::small(64, 20, 21, 22)]
    #[case::tiny(16, 20, 5, 0)]
    #[case::large(4096, 64, 128, 3904)]
    fn a_limit_is_shared_out(
        #[case] mib: u64,
        #[case] own: u64,
        #[case] answers: u64,
        #[case] room: u64,
    ) {
        let budget = budget(mib);
        let shares = [budget.own, budget.answers, budget.room()].map(|bytes| bytes / MIB);
        assert_eq!(shares, [own, answers, room]);
        assert!(budget.answer_bytes() * 2 <= mib * MIB / 3);
    }

    #[test]
    fn who_is_refused_hears_what_is_in_use_and_what_to_raise() {
        let mut ledger = Ledger::new(budget(200));
        for (volume, namespace) in [(1, "a"), (2, "b")] {
            ledger.reserve(&volume, namespace, 50 * MIB).unwrap();
            ledger.release(&volume, 50 * MIB);
            ledger.holds(&volume, namespace, 50 * MIB, true);
        }
        let error = ledger.reserve(&3, "c", 10 * MIB).unwrap_err().to_string();
        for part in [
            "needs 10.0 MiB",
            "100.0 MiB of the 108.4 MiB",
            "limit of 200.0 MiB",
            "linux.driver.resources.limits.memory",
            "91.7 MiB are kept",
        ] {
            assert!(error.contains(part), "no {part} in {error}");
        }
        let error = ledger.reserve(&3, "c", 60 * MIB).unwrap_err().to_string();
        assert!(error.contains("one volume may hold 54.2 MiB"), "{error}");
        ledger.holds(&2, "b", 0, true);
        ledger.holds(&4, "a", 30 * MIB, true);
        let error = ledger.reserve(&3, "a", 5 * MIB).unwrap_err().to_string();
        assert!(
            error.contains("namespace a hold 80.0 MiB of the 81.3 MiB"),
            "{error}"
        );
        ledger.reserve(&3, "c", 5 * MIB).unwrap();
        // The volume's own content makes way.
        ledger.reserve(&1, "a", 20 * MIB).unwrap();
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Asks for so much, and later uses so many percent of it.
        Reserve(u8, u64),
        /// The content is there, and takes so many percent of what was reserved.
        Commit(u8, u64),
        GiveUp(u8),
        /// The content before the last is gone.
        Shrink(u8, u64),
        Unpublish(u8),
        Limit(u64),
        Measure,
    }

    fn step() -> impl Strategy<Value = Step> {
        let volume = 0_u8..12;
        prop_oneof![
            4 => (volume.clone(), 0..40 * MIB).prop_map(|(v, b)| Step::Reserve(v, b)),
            3 => (volume.clone(), 0..=100_u64).prop_map(|(v, p)| Step::Commit(v, p)),
            1 => volume.clone().prop_map(Step::GiveUp),
            2 => (volume.clone(), 0..=100_u64).prop_map(|(v, p)| Step::Shrink(v, p)),
            1 => volume.prop_map(Step::Unpublish),
            1 => (40_u64..400).prop_map(Step::Limit),
            1 => Just(Step::Measure),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Whatever volumes do, what is admitted fits, no namespace and no volume has more than
        /// its share of what was admitted, and in the end nothing is left of them.
        #[test]
        fn what_is_admitted_always_fits(steps in prop::collection::vec(step(), 0..80)) {
            let mut ledger = Ledger::new(budget(200));
            // The bytes that lie in the volumes, and those that are reserved for each.
            let mut real: BTreeMap<u8, u64> = BTreeMap::new();
            let mut pending: BTreeMap<u8, u64> = BTreeMap::new();
            let namespace = |volume: u8| format!("ns-{}", volume % 3);
            for step in steps {
                match step {
                    Step::Reserve(volume, bytes) if !pending.contains_key(&volume) => {
                        let before = ledger.in_use();
                        match ledger.reserve(&volume, &namespace(volume), bytes) {
                            Ok(()) => {
                                prop_assert!(ledger.in_use() <= ledger.budget().room());
                                prop_assert!(bytes <= ledger.budget().of_one_volume());
                                pending.insert(volume, bytes);
                            }
                            Err(_) => prop_assert_eq!(ledger.in_use(), before),
                        }
                    }
                    Step::Commit(volume, percent) => if let Some(reserved) = pending.remove(&volume) {
                        let used = real.entry(volume).or_default();
                        *used += reserved / 100 * percent;
                        let used = *used;
                        let before = ledger.in_use();
                        ledger.release(&volume, reserved);
                        ledger.holds(&volume, &namespace(volume), used, true);
                        prop_assert!(ledger.in_use() <= before);
                    },
                    Step::GiveUp(volume) => if let Some(reserved) = pending.remove(&volume) {
                        ledger.release(&volume, reserved);
                    },
                    Step::Shrink(volume, percent) => if let Some(used) = real.get_mut(&volume) {
                        *used = *used / 100 * percent;
                    },
                    Step::Unpublish(volume) => if !pending.contains_key(&volume) {
                        real.remove(&volume);
                        ledger.holds(&volume, &namespace(volume), 0, true);
                    },
                    Step::Limit(mib) => ledger.set_budget(budget(mib)),
                    Step::Measure => {
                        ledger.measure(|volume| real.get(volume).copied().unwrap_or(0));
                        let held: u64 = real.values().sum();
                        let reserved: u64 = pending.values().sum();
                        // While something is written into a volume, what it held counts.
                        prop_assert!(ledger.in_use() >= reserved);
                        prop_assert!(ledger.in_use() + MIB >= reserved || held > 0);
                    }
                    Step::Reserve(..) => {}
                }
            }
            for (volume, reserved) in pending {
                ledger.release(&volume, reserved);
            }
            ledger.measure(|volume| real.get(volume).copied().unwrap_or(0));
            prop_assert_eq!(ledger.in_use(), real.values().sum::<u64>());
            ledger.measure(|_| 0);
            prop_assert_eq!(ledger.in_use(), 0);
            prop_assert_eq!(ledger.mounted(), 0);
            prop_assert!(ledger.volumes.is_empty());
        }
    }
}
