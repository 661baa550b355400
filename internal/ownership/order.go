package ownership

import (
	"cmp"
	"slices"
)

// The same events give the same effects in the same order, so what goes over many
// sessions goes by their numbers.

func sorted(m map[uint64]*Session) []*Session {
	list := make([]*Session, 0, len(m))
	for _, s := range m {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *Session) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

func (m *Machine) sortedTries() []*Try {
	list := make([]*Try, 0, len(m.tries))
	for t := range m.tries {
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *Try) int { return cmp.Compare(a.Epoch, b.Epoch) })
	return list
}

func (m *Machine) sortedMoves() []*GroupMove {
	list := make([]*GroupMove, 0, len(m.moves))
	for gm := range m.moves {
		list = append(list, gm)
	}
	slices.SortFunc(list, func(a, b *GroupMove) int {
		return cmp.Or(cmp.Compare(a.Group.Key.Pool, b.Group.Key.Pool), cmp.Compare(a.Group.Key.Name, b.Group.Key.Name))
	})
	return list
}
